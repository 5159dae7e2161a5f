"""``snd-data inspect``: what a dataset holds, and whether its poses, intrinsics, depth and images agree."""

import json
import math
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tyro
from jaxtyping import Float, Int
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.utils.rich_utils import CONSOLE
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from data_parsers.any_layout import parse, scene_worlds
from data_parsers.scannetpp import ScanNetppScenesConfig
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.frames import Frames, load_views
from snd_nerfstudio.scenes.mistakes import Verdict, judge
from snd_nerfstudio.scenes.reprojection import Cameras, Matches, match_frames
from snd_nerfstudio.scenes.statistics import (
    SceneStatistics,
    frames_of_scene,
    mend_sizes,
    scene_statistics,
    statistics_table,
)
from snd_nerfstudio.snd_frames import to_frames

SHEET_SIDE = 336
"""Longest side of a picture on a contact sheet, pixels."""
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class SceneReport:
    """What was found out about one scene."""

    statistics: SceneStatistics
    verdicts: list[Verdict]
    """Of sizes, if they are wrong, and of cameras and depth; empty where the scene was not checked."""
    consistency: dict[str, float]
    """Medians over pairs of `viewer.reprojected.consistency`; empty without depth."""
    sheet: Optional[Path]
    """The contact sheet."""


@dataclass
class Inspect:
    """Show what a dataset holds and check its conventions.

    Writes tables, inspect.json, and a contact sheet per scene with points of one view reprojected into another. Ends
    with an error if poses, intrinsics, depth and images do not agree, and names the likely mistake.
    """

    data: Path
    """The dataset's folder, as for ns-train."""
    dataparser: AnnotatedDataParserUnion = field(default_factory=ScanNetppScenesConfig)
    """Layout of the dataset on disk."""
    out: Path = Path("inspect")
    """Where inspect.json and the contact sheets are written."""
    scene: Optional[str] = None
    """Name of the only scene to look at. None: all."""
    checked_scenes: int = 8
    """How many scenes, spread evenly, are matched and drawn; the tables have all of them."""
    pairs: int = 12
    """Pairs of frames that are matched in each checked scene."""
    sheet_pairs: int = 3
    """Pairs on a contact sheet."""
    gaps: tuple[int, int] = (8, 12)
    """Smallest and largest gap between contexts, for the statistics."""

    def main(self) -> list[SceneReport]:
        """Look, write and print.

        Raises:
            InputError: there is nothing to look at, a file is damaged, or a likely mistake was found.
        """
        self._check()
        self.dataparser.data = self.data
        outputs = parse(self.dataparser, "all")
        frames = to_frames(outputs)
        scenes = self._chosen(frames)
        checked = {
            scenes[place]
            for place in np.linspace(0, len(scenes) - 1, min(self.checked_scenes, len(scenes))).astype(int)
        }
        worlds = scene_worlds(outputs)
        # closed here and now: its thread would outlive an error, and can hang a later progress bar
        with closing(track(scenes, "Scenes", console=CONSOLE, transient=True)) as tracked:  # type: ignore
            reports = [self._scene(frames, scene, scene in checked, *worlds[scene]) for scene in tracked]
        self._print(reports)
        self._write(reports)
        self._refuse(reports)
        return reports

    def _check(self) -> None:
        if not self.data.exists():
            raise InputError(f"--data {self.data}: no such file or folder.")
        for name, least in (("checked_scenes", 1), ("pairs", 1), ("sheet_pairs", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {least}.")
        if not 1 <= self.gaps[0] <= self.gaps[1]:
            raise InputError(f"--gaps {self.gaps[0]} {self.gaps[1]}: need 1 <= smallest <= largest.")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.out} cannot be made ({error.strerror}): give another folder.") from error

    def _chosen(self, frames: Frames) -> list[int]:
        if self.scene is None:
            return list(range(len(frames.scene_names)))
        if self.scene not in frames.scene_names:
            raise InputError(
                f"--scene {self.scene}: there is no such scene in {self.data}; there are "
                f"{', '.join(frames.scene_names[:10])}{' ...' if len(frames.scene_names) > 10 else ''}."
            )
        return [frames.scene_names.index(self.scene)]

    def _scene(
        self, frames: Frames, scene: int, checked: bool, world: Float[np.ndarray, "4 4"], scale: float
    ) -> SceneReport:
        indices = frames_of_scene(frames, scene)
        _check_poses(frames, indices)
        frames, wrong_size = mend_sizes(frames, indices)
        statistics = scene_statistics(frames, scene, self.gaps)
        verdicts = [] if wrong_size is None else [wrong_size]
        if not checked:
            return SceneReport(statistics, verdicts, {}, None)
        matches = match_frames(frames, indices, self.pairs)
        distortion = None if frames.distortion is None else frames.distortion[indices]
        cameras = Cameras(frames.camera_to_worlds[indices], frames.intrinsics[indices], distortion)
        verdicts.append(judge(cameras, matches, world, scale))
        sheet, consistency = self._sheet(frames, indices, matches, statistics, verdicts)
        return SceneReport(statistics, verdicts, consistency, sheet)

    def _sheet(
        self,
        frames: Frames,
        indices: Int[np.ndarray, "n"],
        matches: Matches,
        statistics: SceneStatistics,
        verdicts: list[Verdict],
    ) -> tuple[Path, dict[str, float]]:
        """Draw some pairs; how well their points fit comes along, for the views are read anyway."""
        from snd_nerfstudio.viewer.pictures import save_png, sheet
        from snd_nerfstudio.viewer.reprojected import consistency, pair_pictures

        count = len(indices)
        pairs = list(matches.pairs) or [(a, min(a + 8, count - 1)) for a in range(0, max(count - 8, 1), 8)]
        pairs = [
            pairs[place] for place in np.unique(np.linspace(0, len(pairs) - 1, self.sheet_pairs).round().astype(int))
        ]
        height, width = (int(side) for side in frames.sizes[indices[0]])
        factor = SHEET_SIDE / max(height, width)
        size = (max(round(height * factor), 1), max(round(width * factor), 1))
        pictures: dict[str, Any] = {}
        fits = []
        for a, b in pairs:
            with_masks, with_depth = statistics.frames_with_mask == 1, statistics.frames_with_depth == 1
            views = load_views(frames, [int(indices[a]), int(indices[b])], size, with_masks, with_depth)
            own = (matches.first == a) & (matches.second == b)
            # lens distortion is not taken into account here: lines and dots are for the eye
            scaled = np.stack([
                matches.points[end, own] * (np.array(size[::-1]) / frames.sizes[indices[place], ::-1])
                for end, place in enumerate((a, b))
            ])  # fmt: skip
            row = pair_pictures(views, scaled, (views.names[0], views.names[1]))
            columns = len(row)
            pictures |= {f"{caption} ({len(fits) + 1})": picture for caption, picture in row.items()}
            fits.append(consistency(views, 0, 1) if with_depth else {})
        title = f"{statistics.name}: {'; '.join(verdict.sentence for verdict in verdicts)}"
        path = self.out / f"{statistics.name}.png"
        save_png(sheet(pictures, columns, size[0], title), path)
        medians = {key: float(np.median([fit[key] for fit in fits])) for key in fits[0]}
        return path, medians

    # ------------------------------------------------------------------ what is shown

    def _print(self, reports: list[SceneReport]) -> None:
        rows = [asdict(report.statistics) for report in reports]
        if len(reports) > 1:
            rows.append(statistics_table([report.statistics for report in reports]))
        table = Table(title=f"{self.data}", title_justify="left")
        for name in ("scene", "frames", "size", "pairs", "baseline", "angle", "overlap"):
            table.add_column(name, no_wrap=name == "scene")
        coverage = Table()
        for name in ("scene", "masks", "labelled", "regions", "depth", "pixels", "range", "overlaps in tenths"):
            coverage.add_column(name, no_wrap=name == "scene")
        for row in rows:
            table.add_row(
                escape(row["name"]), str(row["frames"]), ", ".join(row["image_sizes"]),
                str(sum(row["pairs_by_gap"].values())), _range(row["baselines"]), _range(row["angles"], 0),
                f"{_range(row['overlaps'])} ({row['overlap_from']})",
            )  # fmt: skip
            coverage.add_row(
                escape(row["name"]), _share(row["frames_with_mask"]), _share(row["labelled_pixels"]),
                _range(row["regions"], 0), _share(row["frames_with_depth"]), _share(row["pixels_with_depth"]),
                _range(row["depths"]), " ".join(str(n) for n in row["overlap_histogram"]),
            )  # fmt: skip
        CONSOLE.print(table)
        CONSOLE.print(coverage)
        low, high = self.gaps
        CONSOLE.print(
            f"Pairs are contexts {low} to {high} frames apart; baselines, angles and overlaps are theirs: 5 %, 50 % "
            "and 95 %."
        )
        for report in reports:
            for verdict in report.verdicts:
                colour = {"consistent": "green", "likely": "red", "unexplained": "red"}.get(verdict.status, "yellow")
                CONSOLE.print(f"[{colour}]{escape(report.statistics.name)}: {escape(verdict.sentence)}")
                if verdict.remedy:
                    CONSOLE.print(f"  {escape(verdict.remedy)}")
            if report.consistency:
                fits = report.consistency
                CONSOLE.print(
                    f"  points of one frame in another: depth off by {fits['depth_error']:.1%}, "
                    f"{fits['visible']:.0%} visible, colours off by {fits['colour_error']:.1%}"
                )
        unchecked = sum(not report.verdicts for report in reports)
        if unchecked:
            CONSOLE.print(f"{unchecked} scenes were not checked: --checked-scenes {len(reports)} checks all.")
        CONSOLE.print(f"{self.out / 'inspect.json'} and the contact sheets in {self.out} have more.", soft_wrap=True)

    def _write(self, reports: list[SceneReport]) -> None:
        content = {
            "data": self.data.name,
            "quantiles": [0.05, 0.5, 0.95],
            "scenes": [
                asdict(report.statistics)
                | {
                    "verdicts": [asdict(verdict) for verdict in report.verdicts],
                    "consistency": report.consistency,
                    "sheet": None if report.sheet is None else report.sheet.name,
                }
                for report in reports
            ],
            "total": statistics_table([report.statistics for report in reports]),
        }
        path = self.out / "inspect.json"
        try:
            path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): give another --out.") from error

    def _refuse(self, reports: list[SceneReport]) -> None:
        wrong = [(report, verdict) for report in reports for verdict in report.verdicts if verdict.wrong]
        if wrong:
            report, verdict = wrong[0]
            scenes = {report.statistics.name for report, _ in wrong}
            more = f" (and {len(scenes) - 1} more)" if len(scenes) > 1 else ""
            raise InputError(
                f"--data {self.data}, scene {report.statistics.name}{more}: {verdict.sentence}. "
                f"Remedy: {verdict.remedy}."
            )


def _check_poses(frames: Frames, indices: Int[np.ndarray, "n"]) -> None:
    poses = frames.camera_to_worlds[indices]
    rotation = poses[:, :3, :3]
    bad = ~np.isfinite(poses).all(axis=(1, 2))
    with np.errstate(invalid="ignore"):
        bad |= ~(np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2)) < 1e-2)
        bad |= ~(np.linalg.det(np.nan_to_num(rotation)) > 0)
    if bad.any():
        first = frames.image_files[int(indices[np.flatnonzero(bad)[0]])]
        raise InputError(
            f"{bad.sum()} camera poses are not rigid (a right-handed rotation and a translation, all finite), the "
            f"first one of {first}: the transform matrix must be a camera-to-world without scale or mirror."
        )


def _range(values: Optional[list[float]], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values) if values else "-"


def _share(value: Optional[float]) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: list[str]) -> None:
    """Entry point of ``snd-data inspect``.

    Args:
        arguments: of the command line, after the command's name.
    """
    flags = (tyro.conf.FlagConversionOff,)  # as in ns-train: --keep-bad-frames True
    tyro.cli(Inspect, args=arguments, prog="snd-data inspect", config=flags).main()
