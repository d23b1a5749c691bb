"""A model for other people: its model card, and its upload to the Hub."""

# ruff: noqa: F401 (the public names of this room)

from minimind.sharing.model_card import (
    CARD,
    SCORE_CARD,
    Choices,
    is_generated,
    write_model_card,
)
from minimind.sharing.upload import UploadPlan, check_name, plan_upload, push
