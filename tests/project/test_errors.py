"""Errors of other libraries, as one line that keeps what they say."""

from __future__ import annotations

import jinja2
import pydantic
import pytest

from mlx_sink import ModelError
from mlx_sink.errors import LONGEST, SinkError, one_line


def raised(make: object) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        make()  # type: ignore[operator]
    return caught.value


def nothing_said() -> None:
    raise AssertionError


def test_all_lines_count():
    error = ValueError("Missing 2 parameters: \nlm_head.weight,\nmodel.norm.weight.")
    assert one_line(error) == (
        "ValueError: Missing 2 parameters: lm_head.weight, model.norm.weight."
    )


def test_long_lists_are_cut_between_names_and_keep_their_count():
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(290)]
    line = one_line(ValueError("Missing 290 parameters: \n" + ",\n".join(names)))
    assert line.startswith("ValueError: Missing 290 parameters: model.layers.0.self_attn.q_proj")
    assert line.endswith("q_proj.weight ...")
    assert len(line) <= LONGEST + len("ValueError:  ...")


def test_templates_and_validators():
    """The first line alone says that there is an error, and not which."""
    template = raised(lambda: jinja2.Template("{% for m in messages %}{{ m }"))
    assert "unexpected '}'" in one_line(template)

    class Settings(pydantic.BaseModel):
        bits: int

    settings = raised(lambda: Settings.model_validate({"bits": "four"}))
    line = one_line(settings)
    assert "bits" in line
    assert "valid integer" in line
    assert "\n" not in line


def test_an_error_that_says_nothing_is_placed():
    line = one_line(raised(nothing_said))
    assert line.startswith("AssertionError: in line ")
    assert line.endswith("test_errors.py")
    assert one_line(ValueError()) == "ValueError"


def test_our_own_are_one_line_whatever_is_put_into_them():
    error = ModelError("cannot load 'a\nb': two\r\n  lines")
    assert str(error) == "cannot load 'a b': two lines"
    assert isinstance(error, SinkError)
    assert str(ModelError("two  spaces")) == "two  spaces"
