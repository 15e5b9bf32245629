"""A model file mapped into memory for reading, with errors a user can act on."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from hasten.cache.reading import NotAFile, open_file
from hasten.errors import FormatError, ModelError

NOT_A_FILE_HINT = "put the file itself there: it is read at many places, and again by the next run"


def map_file(path: Path) -> memoryview:
    """The bytes of a file, read-only and mapped: pages are read from the disk when they are touched.

    The file must not be cut short while it is mapped: the system ends a process that reads past its new end.

    Raises:
        ModelError: there is no such file, it is a folder or a pipe, or it may not be read.
        FormatError: the file is empty.
    """
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(
                    f"{path} is empty (0 bytes)", hint="download it again: the transfer was cut off"
                )
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}", hint="check the path: ls " + str(path.parent)) from error
    except IsADirectoryError as error:
        raise ModelError(f"{path} is a folder, not a model file", hint="give the file's own path") from error
    except NotAFile as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint=NOT_A_FILE_HINT) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}", hint="check that you may read it: ls -l") from error
