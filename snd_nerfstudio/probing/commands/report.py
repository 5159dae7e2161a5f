"""`snd-probe report`: tables and charts of results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.commands.parsing import parse
from snd_nerfstudio.probing.report import Which, make_tables, render
from snd_nerfstudio.probing.results import ProbeResult, read_results, write_text

ENDINGS = {"markdown": ".md", "csv": ".csv", "latex": ".tex"}


@dataclass
class Report:
    """Tables of results: a row for each model, the paper's figure beside ours where there is one."""

    results: tuple[Path, ...] = (Path("probes"),)
    """Result files, and folders of them."""
    format: Literal["markdown", "csv", "latex", "all"] = "markdown"
    """csv has every value unrounded."""
    which: Which = "last"
    """Probes as they are after training, or as they were when best on the test set."""
    tasks: tuple[str, ...] = ()
    """Only these; none: all."""
    out: Optional[Path] = None
    """Folder to write tables and charts to. None: print."""

    def main(self) -> str:
        """Make the tables; print them, or write them and say where.

        Returns:
            What was printed.

        Raises:
            InputError: a result cannot be read, there is none, or a file cannot be written.
        """
        results = [r for r in read_results(self.results) if not self.tasks or r.what.task in self.tasks]
        if not results:
            raise InputError(f"--tasks {' '.join(self.tasks)}: there is no result of these in --results.")
        tables = make_tables(results, self.which)
        chosen = list(ENDINGS) if self.format == "all" else [self.format]
        if self.out is None:
            text = "\n".join(render(tables, form) for form in chosen)  # type: ignore
        else:
            files = []
            for form in chosen:
                files.append(self.out / f"report{ENDINGS[form]}")
                write_text(files[-1], render(tables, form))  # type: ignore
            files += draw_charts(results, self.out)
            text = "\n".join(f"Wrote {file}." for file in files)
        print(text, flush=True)
        return text


def draw_charts(results: Sequence[ProbeResult], folder: Path) -> list[Path]:
    """Recall by the angle between the cameras, a chart for each dataset and protocol (figure 7).

    Raises:
        InputError: a file cannot be written.
    """
    from snd_nerfstudio.probing.pictures import recall_chart
    from snd_nerfstudio.viewer.pictures import save_png

    groups: dict[tuple[str, str, tuple[str, ...]], dict[str, list[Optional[float]]]] = {}
    for result in sorted(results, key=lambda result: (result.what.model, result.what.key)):
        what = result.what
        bins = {name.removeprefix("bin_"): value for name, value in result.last.items() if name.startswith("bin_")}
        if bins:
            group = groups.setdefault((what.dataset.name, what.protocol, tuple(bins)), {})
            group[what.model if what.model not in group else f"{what.model} #{what.key[:6]}"] = list(bins.values())
    files = []
    for number, ((dataset, protocol, names), recalls) in enumerate(sorted(groups.items())):
        files.append(folder / f"correspondence_{dataset}_{protocol}_{number}.png")
        save_png(recall_chart(recalls, names, f"{dataset}, protocol {protocol}"), files[-1])
    return files


def main(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe report``."""
    parse(Report, arguments, "report").main()
