"""Where a model lies, without a network."""

import fnmatch

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError,
)

import checkpoint
import hub


def test_find(tmp_path, monkeypatch):
    """Guards against: a bare KeyError for an unknown name; a model in weights/ that is downloaded all the same."""
    monkeypatch.setattr(hub, "WEIGHTS", tmp_path)
    monkeypatch.setattr(hub, "download", lambda repo, by_hand: ("download", repo, by_hand))
    for name in ("70b", "", "a/b/c", "no-such-folder", "../up", "~nobody-of-this-name/model"):
        with pytest.raises(FileNotFoundError, match="7b, 13b, llama3, phi3, tiny") as caught:
            hub.find(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "tiny")):
        hub.find("tiny")
    by_hand = tmp_path / "llava-hf" / "vip-llava-7b-hf"
    assert hub.find("7b") == ("download", "llava-hf/vip-llava-7b-hf", by_hand)
    by_hand.mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    assert hub.find("7b") == hub.find("llava-hf/vip-llava-7b-hf") == by_hand
    assert hub.find("tiny") == tmp_path / "tiny" and hub.find(tmp_path) == tmp_path
    assert hub.find("someone/vip-llava-7b-hf")[1] == "someone/vip-llava-7b-hf"  # not its namesake


def test_download_takes_one_kind_of_weights(tmp_path, monkeypatch):
    """Guards against: 14 GB fetched twice, as safetensors and as .bin, or a repository's code; and weights that are not
    fetched as something else is there as safetensors."""
    repos = {"a/safe": ["config.json", "model.safetensors", "pytorch_model.bin", "run.py", "onnx/model.safetensors"],
             "a/bin": ["config.json", "tokenizer.model", "pytorch_model.bin", "mm_projector.bin"],
             "a/both": ["config.json", "pytorch_model.bin", "adapter_model.safetensors"]}
    taken = set()

    def snapshot_download(repo, allow_patterns, ignore_patterns):
        for file in repos[repo]:
            allowed = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if allowed and not fnmatch.fnmatch(file, ignore_patterns):
                taken.add(file)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.find("a/safe") == tmp_path and taken == {"config.json", "model.safetensors"}
    (tmp_path / "model.safetensors").unlink()
    taken.clear()
    hub.find("a/bin")
    assert taken == set(repos["a/bin"])
    taken.clear()
    hub.find("a/both")
    assert taken == set(repos["a/both"])


class ProxyError(Exception):
    """As of an HTTP library that the hub's client stands on: not even an OSError."""


@pytest.mark.parametrize("error", [
    LocalEntryNotFoundError("no route to host\nAn error happened\nmore"), OfflineModeIsEnabled("offline"),
    ProxyError("403 Forbidden"), RuntimeError("Data processing error"), OSError(28, "No space left on device"),
])
def test_no_network(monkeypatch, error):
    """Guards against: a traceback where a person needs to hear what to fetch and where to put it."""

    def offline(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        checkpoint.load("13b")
    text = str(caught.value)
    assert "\n" not in text and "https://huggingface.co/llava-hf/vip-llava-13b-hf" in text
    assert str(hub.WEIGHTS / "llava-hf" / "vip-llava-13b-hf") in text and ".safetensors" in text
    assert type(error).__name__ in text and str(error).split("\n")[0] in text


@pytest.mark.parametrize("kind, words", [
    (RepositoryNotFoundError, "the Hugging Face hub shows no such model"), (HFValidationError, "shows no such model"),
    (GatedRepoError, "open only to those who asked for it, at https://huggingface.co/some/typo; then log in"),
])
def test_no_such_model_on_the_hub(monkeypatch, kind, words):
    """Guards against: a misspelled name that is taken for a network that is down, and a closed one for a misspelled one."""

    def not_found(*_, **__):
        raise kind.__new__(kind)  # its arguments differ with the client's version

    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_found)
    with pytest.raises(FileNotFoundError, match=words) as caught:
        hub.find("some/typo")
    assert "by hand" not in str(caught.value)


def test_the_true_reason_is_told(monkeypatch):
    """Guards against: "please check your connection" where the hub had an answer, and a word that is cut in two."""

    def refused(*_, **__):
        raise LocalEntryNotFoundError("please check your connection") from OSError("403 Forbidden " + "and more " * 90)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(FileNotFoundError, match=r"no folder some/typo here, .*OSError: 403 Forbidden .*(and|more) …\)"):
        hub.find("some/typo")
