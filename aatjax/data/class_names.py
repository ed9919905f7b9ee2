"""Class names in the order of a head's outputs."""

from pathlib import Path

from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.tables import Problems, is_number, read_rows
from aatjax.errors import DataError, UsageError, suggest


def read_class_names(source: str) -> tuple[str, ...]:
    """Return the class names of a benchmark, or of a file.

    Args:
        source: the name of a benchmark; a CSV file with the columns `index` and `display_name`, as
            AAT and AST have one for each data set (`class_labels_indices.csv`); or a text file with
            a name on each line.

    Raises:
        UsageError: neither a benchmark nor a file.
        DataError: the file cannot be read, or the indices are not 0, 1, 2, ...
    """
    if source in BENCHMARKS:
        return BENCHMARKS[source].classes
    path = Path(source)
    if not path.is_file():
        hint = suggest(source, BENCHMARKS)
        raise UsageError(
            f"no file and no benchmark {source!r}{hint} (there are {', '.join(BENCHMARKS)})"
        )
    if path.suffix.lower() != ".csv":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: no UTF-8 text of one class name per line: {error}") from None
        return tuple(line.strip() for line in lines if line.strip())
    problems: Problems = []
    names: dict[int, str] = {}
    for number, row in read_rows(path, ",", problems):
        index, name = str(row.get("index", "")), row.get("display_name")
        if not is_number(index) or not name or int(index) in names:
            raise DataError(
                f"{path}, row {number}: index {index[:20]!r} and display_name {str(name)[:40]!r} "
                "are not a new number and a name"
            )
        names[int(index)] = str(name)
    if problems or sorted(names) != list(range(len(names))):
        raise DataError(f"{path}: the indices are not 0 to {len(names) - 1}, one row each")
    return tuple(names[number] for number in range(len(names)))
