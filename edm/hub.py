"""The Hugging Face Hub, by its own library: downloads, uploads, and what may be said in public.

Tokens are the library's business: this project never sees one.
"""

import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib import UserError, user_path, without_password
from dnnlib.download import is_url
from dnnlib.errors import printable
from torch_utils import persistence

INSTALL = "pip install huggingface_hub"
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
USUAL = ("network", "teacher", "best")  # names of networks' files in run folders begin so
KEPT_FILES = (".gitattributes",)  # that the Hub itself puts into a repository


def library(why: str) -> Any:
    """The huggingface_hub library. Errors: UserError, beginning with `why`, when it isn't installed."""
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]  an optional package
    except ImportError:
        raise UserError(f"{why} needs the huggingface_hub library: {INSTALL}") from None
    return huggingface_hub


def download(name: str, patterns: Sequence[str], **options: Any) -> Path:
    """The local folder with the files of a repository that match the patterns, which the library's cache keeps.

    options: as `huggingface_hub.snapshot_download` takes them. Errors: UserError when they can't be downloaded.
    """
    hub = library(f"{name}: no such file or folder here; looking for it on the Hugging Face Hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(patterns), **options))
    except Exception as error:  # of many kinds: offline, absent, gated, no space
        reason = persistence.one_line(error, 200)
        raise UserError(
            f"{name}: no such file or folder here, and it can't be downloaded from the Hugging Face Hub"
            f" ({type(error).__name__}: {reason}); check the name; without internet, name a folder, or fill the"
            " library's cache (HF_HOME)"
        ) from None


# --- uploads


@dataclass(frozen=True)
class Repository:
    """A repository as it was found. head: its last commit; None: it doesn't exist yet. files: their paths."""

    name: str
    head: str | None
    files: tuple[str, ...]


def check_name(name: str) -> None:
    """Errors: UserError when `name` isn't the name of a repository, owner/name."""
    library("uploading")
    from huggingface_hub.errors import HFValidationError  # pyright: ignore[reportMissingImports]
    from huggingface_hub.utils import validate_repo_id  # pyright: ignore[reportMissingImports]

    try:
        validate_repo_id(name)
        is_sound = NAME.fullmatch(name) is not None
    except HFValidationError:
        is_sound = False
    if not is_sound or Path(name).suffix in (".pkl", ".safetensors", ".onnx"):
        raise UserError(
            f"{name[:200]}: isn't the name of a repository on the Hugging Face Hub; give owner/name, of letters,"
            " digits, '-', '_' and '.', without the suffix of a file"
        )


def find_repository(name: str, force: bool, private: bool) -> Repository:
    """The repository that is to be written.

    force: whether it may hold files already. private: whether nobody else may see it.
    Errors: UserError when it holds some and `force` isn't given, when it is public and `private` is given, when the
    user isn't logged in, and when the Hub can't be reached.
    """
    hub = library("uploading")
    from huggingface_hub.errors import RepositoryNotFoundError  # pyright: ignore[reportMissingImports]

    if hub.get_token() is None:
        raise UserError(f"{name}: not logged in to the Hugging Face Hub; run hf auth login, or set HF_TOKEN")
    try:
        found = hub.HfApi().model_info(name)
    except RepositoryNotFoundError:
        return Repository(name, None, ())
    except Exception as error:
        raise _refused(name, error) from None
    if private and not found.private:
        raise UserError(
            f"{name}: is there already and public, and --private is for new repositories; make it private in its"
            " settings on the Hub, or give another name"
        )
    files = tuple(file.rfilename for file in found.siblings or () if file.rfilename not in KEPT_FILES)
    if files and not force:
        raise UserError(
            f"{name}: is there already and holds {len(files)} file{'s' * (len(files) > 1)}, such as"
            f" {sorted(files)[0][:80]}; give another name, or --force to replace them in one commit (the Hub keeps the"
            " former commits)"
        )
    return Repository(name, found.sha, files)


def upload(folder: Path, repository: Repository, private: bool, message: str) -> str:
    """Makes the files of a folder the contents of a repository, in one commit, and returns the repository's address.

    private: whether a new repository is. Errors: UserError when the Hub refuses; then no file has been changed there.
    """
    hub = library("uploading")
    api, name, is_new = hub.HfApi(), repository.name, repository.head is None
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    changes = [hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file)) for path, file in files.items()]
    changes += [hub.CommitOperationDelete(path) for path in repository.files if path not in files]
    created = False
    try:
        if is_new:
            api.create_repo(name, private=private)
            created = True
        api.create_commit(name, changes, commit_message=message, parent_commit=repository.head)
    except Exception as error:
        empty = "; an empty repository of that name was left" if created else ""
        raise _refused(name, error, empty) from None
    return f"{api.endpoint}/{name}"


def _refused(name: str, error: Exception, consequence: str = "") -> UserError:
    """What to say of an error that the Hub's library raised."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = {
        401: "the Hugging Face Hub doesn't accept the token; run hf auth login again, or set a new HF_TOKEN",
        403: f"the token may not write there; check the owner, {name.partition('/')[0]}, and the token's permissions",
        409: "a repository of that name is there already; try again",
        412: "somebody has changed it meanwhile; try again",
    }.get(status or 0)
    if said is None:
        reason = f"{type(error).__name__}: {persistence.one_line(error, 200)}"
        said = (
            f"the Hugging Face Hub refuses or can't be reached ({reason}); --dry-run=FOLDER writes the files without it"
        )
    return UserError(f"{name}: {said}{consequence}")


# --- what may be said in public


def is_name(source: str | os.PathLike) -> bool:
    """Whether `source` has the form of a repository's name, and nothing here has that path."""
    return NAME.fullmatch(str(source)) is not None and not user_path(source).exists()


def title(source: str) -> str:
    """What to call a network in public: the name of its file, or of the folder where the file has a USUAL name."""
    name = public(source)
    if not is_url(source):
        path = user_path(source).absolute()
        if path.suffix and path.stem.startswith(USUAL):
            name = path.parent.name
        elif path.exists():  # a folder in a folder, otherwise taken for a name on the Hub
            name = path.name
    return printable(name.partition("?")[0])


def public(value: Any) -> Any:
    """`value` without passwords, and with names in place of paths and addresses in all its texts, keys included."""
    if isinstance(value, dict):
        return {public(key): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str | os.PathLike):
        return value
    text = os.fspath(value)
    if is_url(text):
        address = urllib.parse.urlsplit(text)
        if address.hostname == "huggingface.co":
            return without_password(text)
        text = address.path
    if not re.search(r"[\\/]", text) or is_name(text):
        return without_password(text)
    return without_password(re.split(r"[\\/]", text.rstrip("\\/"))[-1])
