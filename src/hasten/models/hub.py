"""Models of the Hugging Face hub, downloaded once into the hub's own cache.

`HF_HUB_OFFLINE=1` means the cache only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hasten.cache.reading import is_there
from hasten.errors import ModelError

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt"]
_UNWANTED = ["*/*", "consolidated*", "*.onnx*"]  # other copies of the weights


def download(ref: str) -> Path:
    """A hub id's snapshot folder, or one file of it.

    Args:
        ref: "owner/name", "name", or "owner/name/file.gguf".

    Raises:
        ModelError: no such id or file, not allowed, or no network and not in the cache.
    """
    owner_and_name, _, file = ref.rpartition("/")
    if file.endswith(".gguf") and owner_and_name.count("/") == 1:
        return hub_file(owner_and_name, file)
    if not _ID.fullmatch(ref):
        raise ModelError(
            f"there is no file or folder {ref!r}, and it is no hub id",
            hint="give a folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or demo",
        )
    with _explained(ref):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(ref, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    if not is_there(folder / "config.json"):
        raise ModelError(
            f"{ref} on the hub holds no config.json with safetensors",
            hint=f"if it holds GGUF files, name one: {ref}/FILE.gguf",
        )
    return folder


def hub_file(repo: str, file: str, is_fixed: bool = False) -> Path:
    """One file of a hub id, in the hub's cache.

    Args:
        repo: "owner/name".
        file: its name there.
        is_fixed: its bytes are known to never change: a cached one is taken without asking the hub.

    Raises:
        ModelError: as `download`.
    """
    with _explained(f"{repo}/{file}"):
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(repo, file) if is_fixed else None
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(repo, file))


@contextmanager
def _explained(ref: str) -> Iterator[None]:
    """Turn what the hub's client raises into an error with a next step."""
    import huggingface_hub.errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{ref} on the hub is gated, and you have no access",
            hint=f"ask for access at https://huggingface.co/{ref}, then: hf auth login",
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {ref!r} on the hub (or it is private), and no such file or folder here",
            hint="check the name at https://huggingface.co/models; for a private one: hf auth login",
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{ref} is not in the hub's cache, and the hub cannot be reached",
            hint="check the network and that HF_HUB_OFFLINE is not set, or give a folder or .gguf file",
        ) from error
    except (hub.EntryNotFoundError, hub.RevisionNotFoundError) as error:
        raise ModelError(f"{ref} does not exist on the hub", hint="check the file's name there") from error
    except hub.HFValidationError as error:
        raise ModelError(
            f"{ref!r} is no hub id: {error}", hint="hub ids look like Qwen/Qwen3-0.6B"
        ) from error
    except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # of its HTTP library
        raise ModelError(
            f"downloading {ref} failed: {error!s:.200}", hint="try again: what is complete is kept"
        ) from error
