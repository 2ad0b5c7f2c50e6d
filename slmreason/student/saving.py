"""Whether a student can be saved, found out before it is trained."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from slmreason.run.files import is_no_room
from slmreason.student.selfcheck import fault_of

if TYPE_CHECKING:
    from slmreason.student.student import Student


def try_saving(student: Student) -> None:
    """Saves all but the weights into a folder that is thrown away: what would fail at the end fails now.

    Raises:
        ValueError: transformers refuses; the message says why.
    """
    model = student.base_model
    try:
        with TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            student.tokenizer.save_pretrained(folder)
    except Exception as error:
        if is_no_room(error):  # in the temporary folder, which says nothing of the model
            return
        raise ValueError(
            f"student.model: {student.name} could be trained and not be saved: {fault_of(error)}"
        ) from error
