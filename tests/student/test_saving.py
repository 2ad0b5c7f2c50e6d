"""A student that could not be saved is known before it is trained."""

from __future__ import annotations

import pytest

from slmreason.student import Student
from slmreason.student.saving import try_saving


def test_a_student_that_could_not_be_saved_is_refused_before_it_is_trained(student: Student) -> None:
    student.base_model.generation_config.num_beams = 1
    student.base_model.generation_config.early_stopping = "sometimes"
    with pytest.raises(ValueError, match=r"student.model: .* could be trained and not be saved: ValueError"):
        try_saving(student)
