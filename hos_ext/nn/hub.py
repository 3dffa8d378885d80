"""Models on the Hugging Face hub: read by name, and pushed with a card. Needs the extra `hub`.

What is pushed are the files of `save_model`, by the mixin of huggingface_hub. What is fetched are
safetensors and JSON alone: a pickle can run code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import check, check_flag, check_kind, path_of, require
from ..storage import write_whole
from .card import model_card
from .weights import PICKLES, WEIGHTS

# user/name, as the hub has them; with @ a branch, a tag or a commit.
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_FETCHED = ("*.json", "*.safetensors")


class Download(NamedTuple):
    """How a model is read from the hub.

    Attributes:
        revision: branch, tag or commit; None is main, or what stands behind an @ in the name.
        token: of a private model; None is that of `hf auth login` or HF_TOKEN.
        cache_dir: where files are kept; None is the hub's own cache.
        local_files_only: nothing is downloaded.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: Path | str | None = None
    local_files_only: bool = False


def local_folder(where: str, folder: Any, download: Download) -> Path:
    """A folder that is here, or the hub's copy of a model.

    Args:
        where: the public function.
        folder: a path, or user/name or user/name@revision where no such path is here.
        download: how it is read from the hub.

    Raises:
        ValueError: neither is there, or the model has no safetensors.
        RuntimeError: huggingface_hub is missing, or the hub does not answer.
    """
    path = path_of(where, "folder", folder)
    revision, token, cache_dir, local = download
    check_flag(where, local_files_only=local)
    for name, value in (("revision", revision), ("token", token)):
        if value is not None:
            check_kind(where, name, value, str if name == "revision" else (str, bool))
    if cache_dir is not None:
        path_of(where, "cache_dir", cache_dir)
    found = _NAME.fullmatch(str(folder))
    if path.exists() or found is None:
        rule = "revision must be left out with a folder that is here"
        check(where, revision is None, rule, repr(revision))
        return path
    name, behind = found.groups()
    rule = "revision must be left out where an @ is in the name"
    check(where, revision is None or behind is None, rule, repr(revision))
    try:
        hub = require(where, "huggingface_hub")
    except RuntimeError as error:
        reason = str(error).removeprefix(f"{where}: ")
        raise RuntimeError(
            f"{where}: folder must be here, and {path} is not; for a model of the hub {reason}"
        ) from None
    return _fetched(where, hub, name, download._replace(revision=revision or behind))


def _fetched(where: str, hub: Any, name: str, download: Download) -> Path:
    """The files of a model in the hub's cache."""
    errors = require(where, "huggingface_hub.errors")
    rule = "folder must be here, or a model of the hub that you may read"
    try:
        place = Path(
            hub.snapshot_download(name, allow_patterns=list(_FETCHED), **download._asdict())
        )
    except errors.RevisionNotFoundError:
        got = repr(download.revision or "main")
        raise ValueError(f"{where}: revision must be one of {name}, got {got}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(f"{where}: {rule}, got {name}: {_line(error)}") from None
    except Exception as error:  # of the network, the cache and the server
        raise RuntimeError(
            f"{where}: folder must be here, or on a hub that answers, or in its cache, got {name}: "
            f"{_line(error)}"
        ) from None
    if (place / WEIGHTS).is_file():
        return place
    there = _names(hub, name, download)
    pickles = [each for each in there if Path(each).suffix in PICKLES]
    rule = f"folder must hold {WEIGHTS}"
    if pickles:
        rule += " (a pickle can run code and is not read)"
    got = f"{name} of the hub with {', '.join((pickles or there)[:5]) or 'other files'}"
    raise ValueError(f"{where}: {rule}, got {got}")


def _names(hub: Any, name: str, download: Download) -> list[str]:
    """The files of a model on the hub, where it tells."""
    if download.local_files_only:
        return []
    try:
        found = hub.HfApi(token=download.token).list_repo_files(name, revision=download.revision)
    except Exception:  # only for a message
        return []
    return sorted(found)


def _line(error: Exception) -> str:
    """What an error of the hub says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


class OnHub:
    """What a model has that can be pushed to the hub: it has `save_pretrained` and `config`."""

    save_pretrained: Callable[..., str]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Push a model of hos_ext",
        card: str = "",
        files: Mapping[str, bytes] | None = None,
        **extra: Any,
    ) -> str:
        """Writes the model to the Hugging Face hub, with a model card. Needs the extra `hub`.

        Args:
            repo_id: user/name. It is made if it is not there.
            private: whether a new one is; None is what the account has by default.
            token: None is that of `hf auth login` or HF_TOKEN.
            branch: None is main.
            create_pr: whether a pull request is opened in place of a commit.
            commit_message: of the commit.
            card: Markdown to put into the model card, such as what it was trained on.
            files: other files by name, such as figures of the card.
            extra: facts to keep in the config, as in `save_model`.

        Returns:
            The address of the commit.

        Raises:
            ValueError, TypeError: repo_id or another argument will not do; as `save_model`.
            RuntimeError: huggingface_hub is missing, or the hub refuses or does not answer.

        Example:
            >>> import hos_ext
            >>> model = hos_ext.MLP((2,), 1)
            >>> model.push_to_hub("user/name", private=True)  # doctest: +SKIP
        """
        where = f"{type(self).__name__}.push_to_hub"
        for name, value in (("repo_id", repo_id), ("commit_message", commit_message)):
            check_kind(where, name, value, str)
        check_kind(where, "card", card, str)
        check_flag(where, create_pr=create_pr)
        found = _NAME.fullmatch(repo_id)
        check(where, found and found[2] is None, "repo_id must be user/name", repr(repo_id))
        others = dict(files or {})
        for name in others:
            good = name == Path(name).name and name not in ("README.md", "config.json", WEIGHTS)
            check(where, good, "files must have names of their own", repr(name))

        def write(folder: Path) -> None:
            self.save_pretrained(folder, **extra)
            for name, content in others.items():
                write_whole(folder / name, content)

        config: dict[str, Any] = getattr(self, "config", {})
        pushed = _pushed(where, write, model_card(config, repo_id, card))
        errors = require(where, "huggingface_hub.errors")
        options = {"private": private, "token": token, "branch": branch}
        options |= {"create_pr": create_pr or None, "commit_message": commit_message}
        try:
            return str(pushed.push_to_hub(repo_id, **options))
        except errors.HFValidationError as error:
            raise ValueError(f"{where}: repo_id must be user/name, got {_line(error)}") from None
        except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, ConnectionError) as error:
            raise RuntimeError(
                f"{where}: the hub must answer and let you write to {repo_id}, got: {_line(error)}"
            ) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore"):
                raise RuntimeError(f"{where}: the hub must answer, got: {_line(error)}") from None
            raise


def _pushed(where: str, write: Callable[[Path], None], card: str) -> Any:
    """An object of huggingface_hub's mixin that saves by `write` and has this card."""
    hub = require(where, "huggingface_hub")

    class Pushed(hub.ModelHubMixin, library_name="hos_ext"):  # type: ignore[call-arg, misc, name-defined]
        def __init__(self) -> None:
            pass

        def _save_pretrained(self, save_directory: Path) -> None:
            write(Path(save_directory))

        def generate_model_card(self, *_: Any, **__: Any) -> Any:
            return hub.ModelCard(card)

    return Pushed()
