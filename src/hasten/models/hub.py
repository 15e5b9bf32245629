"""Models on the Hugging Face hub: which files of an id are a model, and fetching them into its cache."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hasten.cache import digest
from hasten.cache.reading import is_there, read_file
from hasten.errors import ModelError
from hasten.models.gguf import models_of, part_names

_log = logging.getLogger("hasten.models")


def has_safetensors(folder: Path) -> bool:
    """Whether a folder is one of config.json and safetensors: those of GGUF files often hold a config too."""
    return is_there(folder / "config.json") and next(folder.glob("*.safetensors"), None) is not None


OWNED = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt"]
# Other copies of the weights: in folders (all but additional_chat_templates), and under other names.
_UNWANTED = ["[!a]*/*", "a[!d]*/*", "consolidated*", "*.onnx*"]


_PAGE = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?P<id>[\w.-]+/[\w.-]+)(?P<kind>:[\w.-]+)?"
    r"(?:/(?:resolve|blob|raw|tree)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+))?)?/?(?:[?#].*)?"
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def plain_ref(ref: str) -> str:
    """What is meant by a page of the hub, or by Ollama's and other programs' forms of its ids.

    Raises:
        ModelError: an address elsewhere, or another revision than main.
    """
    if ref.startswith("file://"):
        return unquote(ref.removeprefix("file://"))
    page = _PAGE.fullmatch(ref)
    if page is not None:
        if page["revision"] not in (None, "main"):
            raise ModelError(
                f"{ref} names the revision {page['revision']!r}; main alone is fetched by name",
                hint=f"fetch it: hf download {page['id']} --revision {page['revision']} --local-dir FOLDER",
            )
        return page["id"] + (f"/{page['file']}" if page["file"] else page["kind"] or "")
    if _SCHEME.match(ref):
        raise ModelError(
            f"{ref} is an address; models are opened from files, folders and ids of the Hugging Face hub",
            hint="download the file first, and give its path",
        )
    if OWNED.fullmatch(ref.rstrip("/")):
        return ref.rstrip("/")
    owner_and_name, at, revision = ref.partition("@")
    if at and OWNED.fullmatch(owner_and_name):
        return plain_ref(f"hf.co/{owner_and_name}/tree/{revision or 'main'}")
    if _TAGGED.fullmatch(ref):
        raise ModelError(
            f"there is no file or folder {ref!r}; names of Ollama's library are not known here",
            hint="give an id of the hub, such as Qwen/Qwen3-0.6B-GGUF:Q4_K_M",
        )
    return ref


_TAGGED = re.compile(r"[\w.-]+:[\w.-]+")


def is_hub_file(ref: str) -> bool:
    """owner/name/file.gguf, or owner/name/folder/file.gguf"""
    first = "/".join(ref.split("/")[:2])
    return ref.count("/") >= 2 and OWNED.fullmatch(first) is not None


def download(ref: str) -> Path:
    """A hub id's snapshot folder, or a GGUF file of it (the first part of a split one, all parts beside it).

    Args:
        ref: "owner/name", "name", "owner/name:Q4_K_M", or "owner/name/file.gguf".

    Raises:
        ModelError: no such id or file, not allowed, or no network and not in the cache.
    """
    repo, _, kind = ref.partition(":")
    if ref.endswith(".gguf") and is_hub_file(ref):
        owner, name, file = ref.split("/", 2)
        return _hub_parts(f"{owner}/{name}", file)
    if not _ID.fullmatch(repo) or (":" in ref and not kind):
        raise ModelError(
            f"there is no file or folder {ref!r}, and it is no hub id",
            hint="give a folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or demo",
        )
    if kind:
        return _hub_parts(repo, _chosen(repo, known_files(repo), kind))
    with explained(ref):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(ref, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    if has_safetensors(folder):
        return folder
    ggufs = [str(p.relative_to(folder)) for p in folder.rglob("*.gguf")]
    if not ggufs:
        with suppress(ModelError):  # no network: what is in the cache is all there is
            ggufs = [name for name in hub_files(ref) if name.endswith(".gguf")]
    if ggufs:
        return _hub_parts(ref, _chosen(ref, ggufs, None))
    if is_there(folder / "config.json"):
        return folder  # what is missing is said by whoever opens it
    raise ModelError(
        f"{ref} on the hub holds no config.json with safetensors, and no GGUF file",
        hint="look at its files at https://huggingface.co/" + ref,
    )


def hub_files(repo: str) -> list[str]:
    """Names of the files of a hub id.

    Raises:
        ModelError: as `download`.
    """
    with explained(repo):
        from huggingface_hub import HfApi

        return list(HfApi().list_repo_files(repo))


def known_files(repo: str) -> list[str]:
    """As `hub_files`; without a network the files that are in the cache.

    Raises:
        ModelError: neither the hub nor the cache knows the id.
    """
    try:
        return hub_files(repo)
    except ModelError:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        with suppress(LocalEntryNotFoundError, OSError):
            folder = Path(snapshot_download(repo, local_files_only=True))
            return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        raise


_USUAL = "Q4_K_M"


def _chosen(repo: str, names: list[str], kind: str | None) -> str:
    """The GGUF file (or first part) of a hub id that a word such as Q8_0 means; None: the only one or Q4_K_M.

    Raises:
        ModelError: none has the word in its name, or several have.
    """
    models = models_of(name for name in names if name.lower().endswith(".gguf"))
    if kind is None and len(models) == 1:
        return models[0]
    text = re.escape(kind or _USUAL)
    word = re.compile(rf"(?<![A-Za-z0-9]){text}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = [name for name in models if word.search(name)]
    if len(found) > 1:  # UD-Q4_K_XL and Q4_K_XL: the plainest name
        found = [name for name in found if not re.search(rf"[A-Za-z]{{2}}-{text}", name)] or found
    if len(found) == 1:
        if kind is None:
            _log.warning("%s has %d GGUF files: %s is taken", repo, len(models), found[0])
        return found[0]
    which = f"{len(found) or 'none'} of them with {kind or _USUAL} in the name"
    shown = ", ".join(models[:8]) + (", ..." if len(models) > 8 else "")
    raise ModelError(
        f"{repo} on the hub has {len(models)} GGUF models, {which}: {shown}",
        hint=f"name one: {repo}/{(found or models or ['FILE.gguf'])[0]}",
    )


def _hub_parts(repo: str, file: str) -> Path:
    """A GGUF file of a hub id with all its parts; the path of the first."""
    paths = [hub_file(repo, one) for one in part_names(file) or (file,)]
    return paths[0]


def hub_file(repo: str, file: str, is_fixed: bool = False) -> Path:
    """One file of a hub id, in the hub's cache.

    Args:
        repo: "owner/name".
        file: its name there.
        is_fixed: its bytes are known to never change: a cached one is taken without asking the hub.

    Raises:
        ModelError: as `download`.
    """
    with explained(f"{repo}/{file}"):
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(repo, file) if is_fixed else None
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(repo, file))


@contextmanager
def explained(ref: str) -> Iterator[None]:
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


@dataclass(frozen=True)
class PulledFile:
    """A file of a hub id whose digest was compared with the hub's."""

    name: str
    path: Path
    bytes: int
    kind: str  # "sha256" of large files, "git_sha1" of small ones
    digest: str


@dataclass(frozen=True)
class Pulled:
    """What was fetched. `ref` is what runs it."""

    ref: str
    revision: str
    folder: Path
    files: tuple[PulledFile, ...]


Tell = Callable[[str, int, int], None]  # file, bytes done, bytes in all


def pull(ref: str, include: tuple[str, ...] = (), tell: Tell = lambda *_: None) -> Pulled:
    """Fetch a model's files and compare their digests with the hub's. What was cut goes on where it stopped.

    Args:
        ref: "owner/name", "owner/name:Q4_K_M" or "owner/name/file.gguf".
        include: texts; files with one of them in the name are taken, alone.
        tell: told of the bytes as they come.

    Raises:
        ModelError: as `download`; no file has such a name; or a digest differs (the file is dropped).
    """
    ref = plain_ref(ref)
    owner_and_name = "/".join(ref.split("/")[:2])
    repo, _, kind = owner_and_name.partition(":")
    if not OWNED.fullmatch(repo):
        raise ModelError(f"{ref!r} is no hub id", hint="hub ids look like Qwen/Qwen3-0.6B")
    with explained(repo):
        from huggingface_hub import HfApi

        info = HfApi().model_info(repo, files_metadata=True)
    known: dict[str, Any] = {one.rfilename: one for one in info.siblings or ()}
    first, names = _asked(ref, repo, kind, include, list(known))
    revision = str(info.sha)
    files = tuple(_fetched(repo, known[name], tell) for name in names)
    folder = files[0].path.parents[len(Path(names[0]).parts) - 1]
    return Pulled(f"{repo}/{first}" if first else repo, revision, folder, files)


def _asked(
    ref: str, repo: str, kind: str, include: tuple[str, ...], names: list[str]
) -> tuple[str, list[str]]:
    """(the GGUF file that runs, or nothing for a folder; all files to fetch)."""
    if include:
        found = [name for name in names if any(text.lower() in name.lower() for text in include)]
        if not found:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ModelError(
                f"{repo} on the hub has no file with {' or '.join(include)} in its name",
                hint=f"its files: {shown}",
            )
        return next((name for name in found if name.endswith(".gguf")), ""), found
    wanted = [n for n in names if any(fnmatch(n, one) for one in _WANTED)]
    wanted = [n for n in wanted if not any(fnmatch(n, one) for one in _UNWANTED)]
    if not kind and ref == repo and any(name.endswith(".safetensors") for name in wanted):
        return "", wanted
    first = ref.split("/", 2)[2] if ref.count("/") > 1 else _chosen(repo, names, kind or None)
    parts = list(part_names(first) or (first,))
    missing = [part for part in parts if part not in names]
    if missing:
        raise ModelError(f"{repo} on the hub has no file {missing[0]}", hint="look at its files there")
    return parts[0], parts


def _fetched(repo: str, entry: Any, tell: Tell) -> PulledFile:
    """One file, in the cache and compared with what the hub says of it."""
    name = str(entry.rfilename)
    with explained(f"{repo}/{name}"):
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(repo, name, tqdm_class=_bar(name, tell)))  # notes what main is
    size = path.stat().st_size
    if entry.lfs is not None:
        kind, wanted, found = "sha256", str(entry.lfs.sha256), digest(path)
    else:
        data = read_file(path)
        kind, wanted = "git_sha1", str(entry.blob_id)
        found = hashlib.sha1(b"blob %d\0" % size + data, usedforsecurity=False).hexdigest()
    if found != wanted:
        path.resolve().unlink(missing_ok=True)  # the cache's copy; else it would be taken for complete
        path.unlink(missing_ok=True)
        raise ModelError(
            f"{name} of {repo} has the {kind} {found}, the hub says {wanted}: it was damaged on its way",
            hint="run the same command again: the file is downloaded anew",
        )
    return PulledFile(name, path, size, kind, found)


def _bar(name: str, tell: Tell) -> Any:
    """A progress bar for the hub's client that draws nothing and tells."""
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    class Bar(tqdm):  # type: ignore[misc, unused-ignore]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.so_far, self.whole = int(options.get("initial") or 0), int(options.get("total") or 0)
            super().__init__(*arguments, **{**options, "disable": True})
            tell(name, self.so_far, self.whole)

        def update(self, n: float | None = 1) -> bool | None:
            self.so_far += int(n or 0)
            tell(name, self.so_far, self.whole)
            return None

    return Bar
