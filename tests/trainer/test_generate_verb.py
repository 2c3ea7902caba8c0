"""What `yaongi generate` prints: texts on stdout, sizes and speed on stderr."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_run import make_run

from pipelines.generate import generate
from trainer.data.tokenizer import Tokenizer
from trainer.export import run as export
from trainer.generate import complete
from trainer.inference.sampling import Sampling


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An export, and what its model writes after two prompts."""
    spec, model = make_run(tmp_path_factory.mktemp("made"))
    export(spec)
    tokenizer = Tokenizer.load(spec.tokens.tokenizer)
    texts = complete(model, tokenizer, ["river", "다리"], max_tokens=12, temperature=0, seed=0)
    return Path(spec.run_dir) / "export", texts


def test_one_text_appears_while_it_is_written_and_is_whole(
    made: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    generate(made[0], ["river"], Sampling(max_tokens=12), chat=False, drafts=False)
    out, told = capsys.readouterr()
    assert out == f"river{made[1][0]}\n"
    assert re.fullmatch(
        r"1 text of up to \d+ tokens, 1 at a time: states of [\d.]+ MiB\n\d+ tokens in [\d.]+ s, [\d.,]+ tokens/s\n",
        told,
    )


def test_several_texts_end_at_a_stop_string(made: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    directory, texts = made
    stop = texts[0][3:6]
    generate(directory, ["river", "다리"], Sampling(max_tokens=12, stop=(stop,)), chat=False, drafts=False)
    cut = [text.split(stop)[0] for text in texts]
    assert cut[0] != texts[0]
    assert capsys.readouterr().out == f"river{cut[0]}\n다리{cut[1]}\n"
