"""Procedural furnished rooms in the tree of the preprocessed ScanNet++, for demos and tests without a download.

`python -m snd_nerfstudio.scenes.rooms --out DIR --scenes N --seed S` writes them; from Python, `generate_rooms` does
the same, `build_room` makes one room in memory and `render_view` renders it from any camera.
"""

from snd_nerfstudio.scenes.rooms.layout import Room, RoomsError, build_room
from snd_nerfstudio.scenes.rooms.rendering import RenderedView, render_view
from snd_nerfstudio.scenes.rooms.writing import RoomsConfig, generate_rooms

__all__ = ["RenderedView", "Room", "RoomsConfig", "RoomsError", "build_room", "generate_rooms", "render_view"]
