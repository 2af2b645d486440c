"""Models of the Hugging Face Hub, by name and in its cache; nothing is downloaded here.

models--facebook--blt-1b/         the cache's folder of facebook/blt-1b
  blobs/                          files by checksum
  refs/main                       the commit that the branch had when it was fetched
  snapshots/COMMIT/               the model, as links to blobs
"""

import re

from etils import epath

from bltjax.system.paths import is_remote


def of_hub_cache(folder: epath.Path) -> tuple[epath.Path, str]:
    """The snapshot in a folder of the cache, with a note; any other folder unchanged.

    Raises:
      ValueError: with the choices, if it is unclear which of several snapshots is meant.
    """
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return folder, ""
    main = folder / "refs" / "main"
    commits = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    commit = main.read_text(encoding="utf-8").strip() if main.exists() else ""
    if commit not in commits and len(commits) == 1:
        commit = commits[0]
    if commit not in commits:
        raise ValueError(
            f"{folder} is a folder of the Hugging Face cache, and its refs/main names none of its"
            f" snapshots; give {folder / 'snapshots'}/ and one of: {', '.join(commits) or 'none'}"
        )
    return folder / "snapshots" / commit, f"snapshot {commit} of the Hugging Face cache"


def not_there(path: epath.Path) -> str:
    """The message for a path that does not exist: it may be the name of a model on the Hub."""
    if is_remote(path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        return f"{path} does not exist"
    return (
        f"{path} does not exist here; if it is a model of the Hugging Face Hub, fetch it first:"
        f" `hf download {path} --local-dir {path.name}`, then convert {path.name}"
    )
