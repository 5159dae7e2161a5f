"""Nerfstudio dataparsers, one file per on-disk layout.

Of ``snd_nerfstudio`` only what does not import nerfstudio may be imported here: nerfstudio discovers dataparsers while
its own datamanagers are still being imported, and a module that needs them would close a circle and break every
``ns-*`` command.
"""
