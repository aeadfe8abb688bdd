"""Where a model lies: a folder, a short name, or a name on the Hugging Face hub, downloaded on first use.

    find("runs/mine")                  a folder: itself
    find("7b")                         a short name of NAMES
    find("llava-hf/vip-llava-7b-hf")   a hub name: WEIGHTS/llava-hf/vip-llava-7b-hf if a person put the files there,
                                       else the hub's own cache, filled with a progress bar
"""

import os
import re
import textwrap
from pathlib import Path

NAMES = {
    "7b": "llava-hf/vip-llava-7b-hf",
    "13b": "llava-hf/vip-llava-13b-hf",
    "llama3": "mucai/vip-llava-llama-3-8b",
    "phi3": "mucai/vip-llava-phi-3-mini-3.8B",
    "tiny": "tiny",  # comes with this code
}
WANTED = ("model.safetensors", "model.safetensors.index.json", "adapter.safetensors")  # where one is, no .bin is needed
WEIGHTS = Path(__file__).resolve().parent / "weights"  # tiny, and under its hub name what was downloaded by hand


def find(path_or_name: str | Path) -> Path:
    """The folder of a model. Raises FileNotFoundError, with the choices or with what to download by hand."""
    name = str(path_or_name)
    if name and name not in NAMES and Path(os.path.expanduser(name)).is_dir():
        return Path(os.path.expanduser(name))
    repo = NAMES.get(name, name)
    local = WEIGHTS / repo
    if name == "tiny" and not local.is_dir():
        raise FileNotFoundError(f"the model tiny should lie in {local}, which is not there")
    if name != "tiny" and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        choices = f"a folder, a short name ({', '.join(NAMES)}) or a hub name such as {NAMES['7b']}"
        raise FileNotFoundError(f"no model {name!r} here; expected {choices}")
    return local if local.is_dir() else download(repo, local)


def download(repo: str, by_hand: Path) -> Path:
    """Fetch configs, tokenizer and weights into the hub's cache: safetensors if there are any, else .bin; no code."""
    from huggingface_hub import snapshot_download  # half a second that only a download needs
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    small = ["*.json", "*.model", "merges.txt"]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=["*.safetensors", *small], ignore_patterns="*/*"))
        if not any((folder / name).is_file() for name in WANTED):
            folder = Path(snapshot_download(repo, allow_patterns=["*.bin", *small], ignore_patterns="*/*"))
        return folder
    except GatedRepoError:
        raise FileNotFoundError(
            f"{repo} is open only to those who asked for it, at https://huggingface.co/{repo}; then log in by `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"no folder {repo} here, and the Hugging Face hub shows no such model (misspelled, or not open to all?)"
        ) from None
    except Exception as error:  # of whichever HTTP library this version of the hub's client stands on
        cause = error.__cause__ or error  # the client's own words are "please check your connection", whatever it was
        reason = textwrap.shorten(f"{type(cause).__name__}: {cause}", 300, placeholder=" …")
        raise FileNotFoundError(
            f"no folder {repo} here, and it can't be downloaded ({reason}); by hand: put the .json, tokenizer and "
            f".safetensors (or else .bin) files of https://huggingface.co/{repo}/tree/main into {by_hand}"
        ) from None
