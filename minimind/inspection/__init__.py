"""What a run will train on: counts, lengths and findings, read off the finished rows."""

from minimind.inspection.chats import has_roles, inspect_chats, inspect_rows
from minimind.inspection.documents import inspect_documents
from minimind.inspection.files import data_paths, inspect_blocks, recognise_stage
from minimind.inspection.inspection import Inspection

__all__ = [
    "Inspection",
    "data_paths",
    "has_roles",
    "inspect_blocks",
    "inspect_chats",
    "inspect_documents",
    "inspect_rows",
    "recognise_stage",
]
