"""What transformers answers with weights/tiny, and how it trains them: writes tests/golden/tiny_answers.json and
tiny_training.npz. Not run by pytest.

    pip install transformers torch tokenizers safetensors pillow
    python tests/golden_tiny.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import transformers

import cases

import checkpoint
from chat import IMAGE, encode_chat
from clip import preprocess
from data.batches import Examples, SceneSource, collate
from data.questions import test_sample
from data.scenes import generator_for
from make_golden import our_whole_name
from overlay import KINDS, draw
from tokenizer import Tokenizer


FOLDER = ROOT / "weights" / "tiny"


def train() -> None:
    """Loss and gradients of one batch of four samples, and the losses of 20 steps of AdamW on it, in float32."""
    model = transformers.VipLlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    ours = checkpoint.load(FOLDER, "cpu", torch.float32)
    data = Examples(SceneSource("markers", 0, 224), ours[1], ours[0].config, False, 1000)
    micro = collate([data[j] for j in range(4)])
    real = torch.arange(micro.ids.size(1)) < torch.tensor([[len(data[j].ids)] for j in range(4)])
    batch = {"input_ids": micro.ids.masked_fill(micro.ids == IMAGE, model.config.image_token_id), "labels": micro.labels,
             "pixel_values": micro.pixels, "attention_mask": real.long()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    for _ in range(cases.TRAINING_STEPS):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        if not losses:
            named = {our_whole_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
            rows = ours[0].config.text.vocab_size
            named = {name: g[:rows] if "embed_tokens" in name or "lm_head" in name else g for name, g in named.items()}
            gradients = cases.fingerprint(named)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {losses[0]:.5f}, after {len(losses)} steps {losses[-1]:.5f}")
    np.savez_compressed(ROOT / "tests" / "golden" / "tiny_training.npz", losses=losses, gradients=gradients)


def main(n: int = 80) -> None:
    model = transformers.VipLlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer, size = Tokenizer.load(FOLDER), model.config.vision_config.image_size
    patches, answers = model.config.image_seq_length, []
    for i in range(n):
        sample = test_sample(generator_for("test", 0, i), kind=KINDS[i % len(KINDS)])
        prompt, _ = encode_chat(tokenizer, "llava_v1", [type(sample.turns[0])(sample.turns[0].question, image=True)])
        ids = [t for i in prompt for t in ([model.config.image_token_id] * patches if i == IMAGE else [i])]
        pixels = preprocess(draw(sample.image, sample.markers), size)[None]
        with torch.inference_mode():
            out = model.generate(input_ids=torch.tensor([ids]), pixel_values=pixels, attention_mask=torch.ones(1, len(ids)),
                                 do_sample=False, max_new_tokens=12)
        answers.append([t for t in out[0, len(ids):].tolist() if t != tokenizer.eos])
    right = sum(tokenizer.decode(a) == test_sample(generator_for("test", 0, i), kind=KINDS[i % len(KINDS)]).turns[0].answer
                for i, a in enumerate(answers))
    print(f"{right} of {n} right")
    (ROOT / "tests" / "golden" / "tiny_answers.json").write_text(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
    train()
