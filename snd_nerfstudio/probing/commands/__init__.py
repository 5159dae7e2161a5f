"""The commands of `snd-probe`; `snd_probe` says which there are."""
