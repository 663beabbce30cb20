"""A run on the Hugging Face hub: its weights, its record and its card, uploaded as one commit.

config.json model.safetensors run.json      the run's own files
README.md                                   the card: the run's, if it has one, or else made of its files
"""

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi

from heads import checkpoint
from heads.errors import HubError
from heads.model_card import is_made, model_card
from heads.run_files import RECORD, read_run

CARD = "README.md"


class Pushed(NamedTuple):
    """What became of a push.

    Attributes:
        commit: its address.
        kept_card: a card of somebody else's was there, and stays.
    """

    commit: str
    kept_card: bool


def push_run(
    run: str | Path, repo: str, *, private: bool | None = None, token: str | None = None
) -> Pushed:
    """Upload a finished run.

    Args:
        run: its directory. A README.md in it is its card.
        repo: OWNER/NAME; made if need be. Where the run has no README.md, one that is there stays, unless it was made
            by an earlier push and nobody has edited it.
        private: of a repository that is made now; None is what its owner's settings say.
        token: None takes that of `hf auth login`, or of the environment.

    Raises:
        FileNotFoundError, CheckpointMismatch: it is no finished run, or damaged.
        HubError: the hub refuses, or cannot be reached.
    """
    run = Path(run)
    record, description = read_run(run), checkpoint.describe(run)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in (*checkpoint.FILES, RECORD):
            shutil.copyfile(run / name, folder / name)
        if (run / CARD).is_file():
            shutil.copyfile(run / CARD, folder / CARD)
        else:
            tables = sorted(run.glob("scores-*.zarr"))
            model_card(description, record, tables, repo=repo).save(folder / CARD)
        with _said(repo):
            repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
            theirs = not (run / CARD).is_file() and _has_own_card(api, repo)
            if theirs:
                (folder / CARD).unlink()
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"{record['method']} on {record['task']}, by headstart",
            )
    return Pushed(str(done.commit_url), theirs)


def _has_own_card(api: HfApi, repo: str) -> bool:
    """Is there a card that no push made, or that somebody has edited since?"""
    if not api.file_exists(repo, CARD):
        return False
    with tempfile.TemporaryDirectory() as place:
        page = Path(api.hf_hub_download(repo, CARD, local_dir=place)).read_bytes()
    return not is_made(page.decode(errors="replace"))


@contextmanager
def _said(repo: str) -> Generator[None]:
    """Whatever the hub's client says, in one sentence; its errors have no common root."""
    try:
        yield
    except Exception as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise HubError(
            f"the run was not pushed to {repo}: {what}; check the name and the network, and that `hf auth login` or "
            "HF_TOKEN gave a token that may write there. The run is as it was"
        ) from error
