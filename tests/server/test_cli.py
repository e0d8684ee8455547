"""trt-serve's command line: every option of the server has a word, with the same default, and is checked."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from sdxl_trt.server.cli import _parser, main, options_of
from sdxl_trt.server.options import Options

WITHOUT_A_WORD = {"keys"}
"""They come from a file."""


def read(*words: str) -> Options:
    return options_of(_parser().parse_args(words))


def test_without_words_the_options_are_their_defaults() -> None:
    assert read() == Options()


def test_every_option_has_a_word(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsk-1\n\n sk-2 \n")
    words = f"""bundle --host ::1 --port 0 --provider openvino --residency swap --vram 1GiB --queue 2 --queue-pictures 3
        --compute-precision fp32 --deadline 4.5 --max-body 5MiB --max-pixels 6
        --open comfy,a1111 --on-disconnect finish --cors-origin
        https://a.example --allowed-hosts a,b --grace 7 --fixed-batch --lora-dir {tmp_path} --embedding-dir {tmp_path}
        --rate-requests 5 --rate-seconds 9 --metrics-port 9 --traces --trusted-proxy 10.0.0.0/8 --quality-steps low=2
        --alias x --lenient --round-sizes --allow-options --interrupt all --previews --no-docs --api-key-file {keys}"""
    read_options = read(*words.split())
    unchanged = [each.name for each in fields(Options)
                 if getattr(read_options, each.name) == getattr(Options(), each.name)]  # fmt: skip
    assert set(unchanged) == WITHOUT_A_WORD - {"keys"}
    assert read_options.keys == {"sk-1", "sk-2"}
    assert read_options.open_apis == {"comfyui", "a1111"}
    assert replace(read_options, engines=None).max_body == 5 << 20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--port 65536", "--port"), ("--queue 0", "--queue"), ("--deadline nan", "--deadline"),
        ("--grace -1", "--grace"),
        ("--open everything", "--open"), ("--cors-origin *", "--cors-origin"), ("--interrupt none", "--interrupt"),
        ("--cors-origin https://a.example/path", "--cors-origin"), ("--lora-dir nowhere", "--lora-dir"),
        ("--trusted-proxy proxy", "--trusted-proxy"), ("--quality-steps low", "--quality-steps"),
        ("--quality-steps best=2", "--quality-steps"), ("--quality-steps low=inf", "--quality-steps"),
        ("--api-key-file nowhere", "--api-key-file"), ("--api-key-file /dev/null", "has no key"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_one_line(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words.split())
    except SystemExit as exc:
        code = int(exc.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
