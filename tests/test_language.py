"""Plain technical English: retired words stay out of code, messages and pages."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RETIRED = re.compile(
    r"\b(anew|mend(s|ed|ing)?|told|besides|all the same|without more ado|so many|to no good|in vain"
    r"|put(s|ting)? up with|commonest|seen by nobody|heard by|hears)\b",
    re.IGNORECASE,
)
RIDDLE = re.compile(r"^(How sure|What of a|What a run would|What an? \w+ (hears|sees|knows))")
FOLDERS = ("aatjax", "kernels", "configs", "tools", "tests", "docs", ".ci")


def find_files() -> list[Path]:
    pages = [path for pattern in ("*.md", "*.toml", "*.cff") for path in ROOT.glob(pattern)]
    suffixes = (".py", ".md", ".js", ".html", ".css", ".sh", ".yaml", ".j2")
    below = [p for name in FOLDERS for p in (ROOT / name).rglob("*") if p.suffix in suffixes]
    below = [p for p in below if "exports" not in p.parts]  # written by older versions
    here = Path(__file__).resolve()
    return sorted(p for p in {*pages, *below} if p.is_file() and p != here)


def read_prose(path: Path) -> list[tuple[int, str]]:
    """Strings and comments of a Python file, every line of another file, with line numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return list(enumerate(text.splitlines(), 1))
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            found += list(enumerate(token.string.splitlines(), token.start[0]))
    return found


def find_retired(lines: list[tuple[int, str]]) -> list[str]:
    riddles = [n for n, line in lines if RIDDLE.match(line.strip().strip('"'))]
    words = [f"{n}: {m.group(0)}" for n, line in lines for m in RETIRED.finditer(line)]
    return words + [f"{n}: a riddle" for n in riddles]


@pytest.mark.parametrize("folder", [*FOLDERS, ""])
def test_retired_words_stay_out(folder: str) -> None:
    wrong = []
    for path in find_files():
        parts = path.relative_to(ROOT).parts
        if (parts[0] if len(parts) > 1 else "") == folder:
            wrong += [f"{path.relative_to(ROOT)}:{hit}" for hit in find_retired(read_prose(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line", ["it is made anew", "as told by the file", "How sure a number is", "seen by nobody"]
)
def test_a_retired_word_is_found(line: str) -> None:
    assert find_retired([(1, line)])
