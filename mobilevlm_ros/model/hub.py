"""What is asked of the Hugging Face hub: the commit of a revision, its files, and the bytes of one of them.

huggingface_hub does the talking. Its ``snapshot_download`` starts a file anew when a run was interrupted (it takes up
only what broke within a run), which is no way to get 3 GB over a robot's network; so files come one by one through
its ``http_get``, which begins where a partial file ends. Whatever goes wrong is raised as it comes.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from mobilevlm_ros.errors import DependencyError, FetchError
from mobilevlm_ros.model.manifest import PublishedFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ['Hub']

_COMMIT = re.compile(r'[0-9a-f]{40}\Z')


class Hub:
    """One repository of models on the hub, whose address ``HF_ENDPOINT`` changes, as everywhere else."""

    def __init__(self, repo: str) -> None:
        """:raise DependencyError: if huggingface_hub is not installed."""
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise DependencyError(
                f'downloading needs huggingface_hub ({error}): pip install huggingface_hub, or download '
                f'https://huggingface.co/{repo} yourself and give the folder with --from'
            ) from error
        self._repo = repo
        self._endpoint = os.environ.get('HF_ENDPOINT') or None
        self._api: HfApi = HfApi(endpoint=self._endpoint, library_name='mobilevlm_ros')

    def commit(self, revision: str) -> str:
        """The whole name of a commit, given as its beginning; that of ``main`` for an empty one.

        :raise FetchError: if there is no such commit.
        """
        if _COMMIT.match(revision):
            return revision
        for found in self._api.list_repo_commits(self._repo):
            if found.commit_id.startswith(revision):
                return found.commit_id
        raise FetchError(f'{self._repo} has no commit {revision} on its main branch: it was rewritten')

    def files(self, commit: str) -> dict[str, PublishedFile]:
        """Size, and hash if the hub keeps one, of every file that is in no subfolder."""
        from huggingface_hub.hf_api import RepoFile

        tree = self._api.list_repo_tree(self._repo, revision=commit)
        return {
            file.path: PublishedFile(file.size, file.lfs.sha256 if file.lfs else '')
            for file in tree
            if isinstance(file, RepoFile) and '/' not in file.path
        }

    def download(self, commit: str, name: str, part: Path, n_bytes: int, on_bytes: Callable[[int], None]) -> None:
        """Bring a file into ``part``, beginning where it ends.

        :param on_bytes: told how long it is by now.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, tqdm  # type: ignore[attr-defined]

        class Silent(tqdm):
            """A progress bar that shows nothing: whoever called shows one."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, 'disable': True})

        url = hf_hub_url(self._repo, name, revision=commit, endpoint=self._endpoint)
        with _Counted(part, on_bytes) as file:
            http_get(
                url,
                cast(BinaryIO, file),
                resume_size=file.tell(),
                headers=build_hf_headers(library_name='mobilevlm_ros'),
                expected_size=n_bytes,
                tqdm_class=Silent,
            )


class _Counted(io.FileIO):
    """A file that is added to, and tells how long it has become."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path, 'a')
        self._on_bytes = on_bytes

    def write(self, data: Any, /) -> int:
        written = super().write(data)
        self._on_bytes(self.tell())
        return written
