"""A run on the Hugging Face hub: its weights, its record and its card, uploaded as one commit.

config.json model.safetensors run.json      the run's own files
README.md                                   the card: the run's, if it has one, or else made of its files
"""

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from heads import checkpoint
from heads.errors import HubError
from heads.model_card import model_card
from heads.run_files import RECORD, read_run

CARD = "README.md"


def push_run(
    run: str | Path, repo: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a finished run; returns the address of the commit.

    Args:
        run: its directory. A README.md in it is its card.
        repo: OWNER/NAME; made if need be. A README.md that is there and that the run has not stays as it is.
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
            theirs = not (run / CARD).is_file() and api.file_exists(repo, CARD)
            if theirs:
                (folder / CARD).unlink()
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"{record['method']} on {record['task']}, by headstart",
            )
    return str(done.commit_url)


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
