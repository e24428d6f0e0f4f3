"""UP-8: a form is relayed byte for byte; only an alias is replaced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.api.multipart import PARTS_MAX, replace_field, text_fields
from smg.errors import GatewayError

TYPE = b"multipart/form-data; boundary=edge"
FORM = (
    b'--edge\r\nContent-Disposition: form-data; name="file"; filename="name=model.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\nRIFF\r\n--edg\x00\xff\r\n\r\n\r\n"
    b'--edge\r\ncontent-disposition: form-data; name="model"\r\n\r\nalias\r\n'
    b"--edge  \r\nContent-Disposition: form-data; name=empty\r\n\r\n\r\n"
    b"--edge--\r\n"
)


def test_fields_are_found_with_quoted_and_bare_names() -> None:
    fields = text_fields(FORM, TYPE)
    assert fields["model"] == "alias"
    assert fields["empty"] == ""
    assert fields["file"].startswith("RIFF\r\n--edg")


@pytest.mark.parametrize(
    "content_type",
    [
        b'multipart/form-data; boundary="edge"',
        b"Multipart/Form-Data; charset=utf-8; Boundary=edge",
        TYPE + b"; x=y",
    ],
)
def test_boundaries_are_read_in_every_spelling(content_type: bytes) -> None:
    assert text_fields(FORM, content_type)["model"] == "alias"


def test_a_replaced_field_leaves_every_other_byte() -> None:
    assert replace_field(FORM, TYPE, "model", b"whisper-1") == FORM.replace(b"alias", b"whisper-1")
    assert replace_field(FORM, TYPE, "nobody", b"x") == FORM


def test_every_part_of_a_name_is_replaced() -> None:
    part = b'--edge\r\nContent-Disposition: form-data; name="model"\r\n\r\nalias\r\n'
    assert (
        replace_field(part * 2 + b"--edge--", TYPE, "model", b"m")
        == part.replace(b"alias", b"m") * 2 + b"--edge--"
    )


def test_a_value_cannot_end_its_part() -> None:
    with pytest.raises(ValueError):
        replace_field(FORM, TYPE, "model", b"x\r\n--edge--")


def test_a_preamble_is_passed_over() -> None:
    assert text_fields(b"preamble\r\n" + FORM, TYPE)["model"] == "alias"


@pytest.mark.parametrize(
    "content_type", [None, b"", b"application/json", b"multipart/form-data", b"multipart/mixed; boundary=x"]
)
def test_another_content_type_is_invalid_type(content_type: bytes | None) -> None:
    with pytest.raises(GatewayError) as caught:
        text_fields(FORM, content_type)
    assert (caught.value.status, caught.value.code) == (400, "invalid_type")


@pytest.mark.parametrize("cut", range(1, len(FORM) - 5, 3))
def test_a_form_that_ends_early_is_refused(cut: int) -> None:
    with pytest.raises(GatewayError) as caught:
        text_fields(FORM[: len(FORM) - 4 - cut], TYPE)
    assert caught.value.status == 400


def test_a_form_of_too_many_parts_is_refused() -> None:
    part = b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n'
    assert text_fields(part * PARTS_MAX + b"--edge--", TYPE) == {"a": "x"}
    with pytest.raises(GatewayError):
        text_fields(part * (PARTS_MAX + 1) + b"--edge--", TYPE)


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_garbage_is_fields_or_a_refusal_of_400(body: bytes, content_type: bytes) -> None:
    for kind in (content_type, TYPE):
        for text in (body, b"--edge\r\n" + body, FORM[:100] + body + b"\r\n--edge--"):
            try:
                assert isinstance(text_fields(text, kind), dict)
            except GatewayError as error:
                assert error.status == 400
