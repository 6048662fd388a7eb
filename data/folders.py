"""Where the pictures of one dataset or of several lie."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageFolders:
    """Where pictures lie: each folder by what the names of its pictures begin with, "" where there is one alone."""

    folders: dict[str, Path]

    def path(self, image: str) -> Path:
        """Return the path of the picture that a table calls `image`."""
        prefix = "" if "" in self.folders else image.partition("/")[0] + "/"
        return self.folders[prefix] / image.removeprefix(prefix)

    def group(self, images: Iterable[str]) -> Iterator[tuple[str, Path, list[str]]]:
        """Yield each prefix with its folder and those of the pictures that lie there, sorted."""
        found = sorted(images)
        for prefix, folder in self.folders.items():
            yield prefix, folder, [image for image in found if image.startswith(prefix)]
