"""A user's own data as data sources: folders, tables and class folders, to train on and to be scored on."""

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Sources of files and of tables."""
    from distill_layouts.class_folder import ClassFolder
    from distill_layouts.folder import Folder
    from distill_layouts.table import Table

    return [ClassFolder, Folder, Table]
