"""What transformers answers with weights/tiny: writes tests/golden/tiny_answers.json. Not run by pytest.

    pip install transformers torch tokenizers safetensors pillow
    python tests/golden_tiny.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers

from chat import IMAGE, encode_chat
from clip import preprocess
from data.scenes import generator_for, test_sample
from overlay import KINDS, draw
from tokenizer import Tokenizer


def main(n: int = 80) -> None:
    model = transformers.VipLlavaForConditionalGeneration.from_pretrained(ROOT / "weights" / "tiny", dtype=torch.float32)
    tokenizer, size = Tokenizer.load(ROOT / "weights" / "tiny"), model.config.vision_config.image_size
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
