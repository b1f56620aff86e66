# SPDX-License-Identifier: Apache-2.0
"""Uploads to the Hugging Face hub, in the background of a run that they never end."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from lm_scale.data.tokenizer import TOKENIZER_FILES

# What a user of the model wants, from the top of the run's directory: no checkpoints,
# no data, nothing that the run keeps for itself.
MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", *TOKENIZER_FILES, "eval_results.json", "README.md",
    "metrics.jsonl", "events.out.tfevents.*",
)  # fmt: skip
NEXT_SAVE = "the next save tries again."
PATIENCE = 3600  # s that the end of a run waits for one upload, at most


class HubUploads:
    """Uploads a run's model, each time it is told to; one upload at a time.

    Whatever goes wrong (no network, no token, a name that is refused, no space) prints
    one line and nothing else: the next upload tries again, the repository's creation
    too. What is sent is what the folder held when the upload was started: the run may
    replace the weights and write on meanwhile.

    Args:
        folder: the run's directory, of which MODEL_FILES go, through `.upload` in it.
        repo_id: "owner/name", or "name" for the owner of the token.
        token: None: what huggingface_hub finds (HF_TOKEN, `hf auth login`).
        console_print: gets each line, some of them from another thread.
    """

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        *,
        token: str | None = None,
        console_print: Callable[[str], None] = print,
    ):
        self.folder = Path(folder)
        self.repo_id = repo_id
        self.print = console_print
        self._token = (token or "").strip() or None
        self._created = False  # True: the repository is known to exist
        self._asked: str | None = None  # the message of the newest upload asked for
        self._uploaded: str | None = None  # and of the newest one that is done
        self._given_up = False  # True: nobody waits to hear how the thread ends
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """If something is under way: an upload, or the repository's creation."""
        return self._thread is not None and self._thread.is_alive()

    def create(self) -> None:
        """Begins to create the repository, unless it exists; call it first.

        A missing token or network is then told before hours of training, not after.
        """
        self._begin(self._create, "Creating the hub repository", NEXT_SAVE)

    def start(self, message: str) -> None:
        """Takes the files as they are now and begins to upload them.

        Does nothing if it is `busy`: the next save, or `finish`, brings newer files.
        """
        self._asked = message
        if not self.busy:
            self._begin_upload(message, NEXT_SAVE)

    def finish(self, message: str) -> None:
        """Waits for what is under way, makes the last upload and waits for it too.

        Ctrl-C gives up, as does an hour of waiting for one of them.
        """
        self._asked = message
        self.print(f"Uploading to the hub, {self.repo_id}. Ctrl-C gives up.")
        try:
            if self._wait():
                self._begin_upload(message, f"the files are in {self.folder}.")
                if self._wait():
                    return
            reason = f"it took longer than {PATIENCE / 60:.0f} minutes"
        except KeyboardInterrupt:
            reason = "Ctrl-C"
        self._leave()
        self.print(
            f"Gave up the upload to the hub ({reason}): the files are in {self.folder}."
        )

    def give_up(self) -> None:
        """Ends an interrupted run without waiting; tells if an upload is missing."""
        self._leave()
        if self._asked != self._uploaded:
            self.print(
                f"Not uploaded to the hub: {self._asked}; the next command goes on."
            )

    def _begin_upload(self, message: str, otherwise: str) -> None:
        what = "Upload to the hub"
        try:
            self._stage()
        except OSError as error:
            self._tell(what, error, otherwise)
        else:
            self._begin(lambda api: self._upload(api, message), what, otherwise)

    def _stage(self) -> None:
        """Puts into `.upload` what is to be uploaded, as it is now.

        Weights are linked: an export gives their name to a new file, and the old one
        lasts as long as its link. The rest is small, and partly written in place.
        Not `allow_patterns` on the run's directory: their * crosses folders, all the
        checkpoints would be walked while they come and go, and a file that grows
        between being hashed and being sent is refused.
        """
        self._clean()  # a killed run left its own
        self._staging.mkdir()
        for pattern in MODEL_FILES:
            for path in self.folder.glob(pattern):
                target = self._staging / path.name
                if path.suffix == ".safetensors":
                    try:
                        os.link(path.resolve(), target)
                        continue
                    except OSError:  # a file system without links
                        pass
                shutil.copy2(path, target)

    @property
    def _staging(self) -> Path:
        return self.folder / ".upload"  # in the same file system, as links must be

    def _clean(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)

    def _begin(self, work: Callable, what: str, otherwise: str) -> None:
        self._thread = threading.Thread(
            target=self._do_or_tell,
            args=(work, what, otherwise),
            name="hub upload",
            daemon=True,  # a run that is ended does not wait for it
        )
        self._thread.start()

    def _wait(self) -> bool:
        """False if something is under way still."""
        if self._thread is not None:
            self._thread.join(PATIENCE)
        return not self.busy

    def _leave(self) -> None:
        """An upload under way ends without a word, or dies with the process."""
        self._given_up = True
        self._clean()

    def _do_or_tell(self, work: Callable, what: str, otherwise: str) -> None:
        token = self._token
        try:
            from huggingface_hub import HfApi, get_token
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()  # they would be drawn across the run's
            token = token or get_token()
            if not token:
                raise LookupError("no token: set HF_TOKEN, or run `hf auth login`")
            work(HfApi(token=token))
        except BaseException as error:  # hf_xet, in Rust, can panic: no Exception
            self._tell(what, error, otherwise, token)

    def _tell(
        self, what: str, error: BaseException, otherwise: str, token: str | None = None
    ) -> None:
        reason = str(error).replace(token, "<token>") if token else str(error)
        if not self._given_up:
            self.print(
                f"{what} failed ({type(error).__name__}: "
                f"{' '.join(reason.split()):.300}): the run goes on; {otherwise}"
            )

    def _create(self, api) -> None:
        if not self._created:
            url = api.create_repo(self.repo_id, exist_ok=True)
            self.repo_id = url.repo_id  # now with its owner
            self._created = True
            if not self._given_up:
                self.print(f"Uploads go to {url}")

    def _upload(self, api, message: str) -> None:
        try:
            self._create(api)
            api.upload_folder(
                repo_id=self.repo_id,
                folder_path=self._staging,
                commit_message=message,
            )
            self._uploaded = message
        finally:
            self._clean()
