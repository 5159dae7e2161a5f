import copy
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.snd_pipeline import _psnr, load_trained_model, strip_prefixes


def test_psnr_by_hand():
    # mean squared error 0.01 is 20 dB; colours beyond white count as white
    assert _psnr(torch.full((4, 3), 0.4), torch.full((4, 3), 0.5)) == pytest.approx(20.0, abs=1e-4)
    assert _psnr(torch.full((4, 3), 1.7), torch.full((4, 3), 0.9)) == pytest.approx(20.0, abs=1e-4)


def test_evaluation_needs_something_held_out(tiny_config):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    pipeline.datamanager._eval_indices = []
    with pytest.raises(InputError, match="Nothing is held out"):
        pipeline.get_average_eval_image_metrics()


def test_evaluation_does_not_disturb_training(tiny_config):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    undisturbed = float(pipeline.get_train_loss_dict(4)[1]["distillation"].detach())
    pipeline.get_average_eval_image_metrics()
    metrics, pictures = pipeline.get_eval_image_metrics_and_images(4)
    pipeline.get_eval_loss_dict(4)
    assert float(pipeline.get_train_loss_dict(4)[1]["distillation"].detach()) == undisturbed
    assert metrics["num_rays"] == 56 * 84 and pipeline.model.training
    assert all(picture.ndim == 3 and picture.shape[-1] == 3 for picture in pictures.values())


def test_a_loss_that_is_not_finite_names_the_triplet(tiny_config):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    with torch.no_grad():
        pipeline.model.student.head.mlp[0].bias.fill_(float("nan"))
    with pytest.raises(InputError, match=r"step 3 is not finite.*DSC"):
        pipeline.get_train_loss_dict(3)


def test_gaussians_that_cover_nothing_are_reported_before_training(tiny_config):
    # depth read as micrometres: everything lies in front of the cameras' near plane
    from snd_nerfstudio.reconstruction.depth import DepthReconstructor

    class Shrunk(DepthReconstructor):
        def __call__(self, views):
            return super().__call__(replace(views, depths=views.depths * 1e-3))

    import snd_nerfstudio.snd_datamanager as module

    original = module.RECONSTRUCTORS["depth"]
    module.RECONSTRUCTORS["depth"] = Shrunk
    try:
        with pytest.raises(InputError, match="cover nothing of the target views.*unit of the depth"):
            tiny_config.pipeline.setup(device="cpu")
        tiny_config.pipeline.setup(device="cpu", test_mode="test")  # looking at a run is still possible
    finally:
        module.RECONSTRUCTORS["depth"] = original


def test_held_out_triplets_of_a_step_do_not_depend_on_what_was_evaluated_before(tiny_config):
    first, second = (tiny_config.pipeline.setup(device="cpu") for _ in range(2))
    first.get_eval_loss_dict(0)
    assert first._eval_triplet_of(40).describe() == second._eval_triplet_of(40).describe()
    assert len({first._eval_triplet_of(step).describe() for step in range(0, 400, 50)}) == 3


def test_keys_of_a_distributed_checkpoint_are_recognised():
    state = {"_model.module.student.a": 1, "_model.teacher.b": 2}
    assert strip_prefixes(state) == {"student.a": 1, "teacher.b": 2}


def test_a_run_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_trained_model(tmp_path / "config.yml")
    (tmp_path / "config.yml").write_text("a: 1")
    with pytest.raises(InputError, match="is not of a run of"):
        load_trained_model(tmp_path / "config.yml")


def _gradients_of_one_rank(rank, config, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    pipeline = config.pipeline.setup(device="cpu", world_size=2, local_rank=rank)
    pipeline.get_train_loss_dict(0)[1]["distillation"].backward()
    named = pipeline.model.student.named_parameters()
    torch.save({name: p.grad for name, p in named if p.requires_grad}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_their_own_triplets(tiny_config, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = copy.deepcopy(tiny_config)
    mp.spawn(_gradients_of_one_rank, args=(config, port, str(tmp_path)), nprocs=2)
    together = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = []
    for rank in (0, 1):
        pipeline = tiny_config.pipeline.setup(device="cpu", local_rank=rank)
        pipeline.get_train_loss_dict(0)[1]["distillation"].backward()
        alone.append({n: p.grad for n, p in pipeline.model.student.named_parameters() if p.requires_grad})
    name = "head.mlp.0.weight"
    assert not torch.allclose(alone[0][name], alone[1][name], rtol=1e-2)  # the ranks saw different triplets
    for name, gradient in together[0].items():
        torch.testing.assert_close(gradient, together[1][name], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-3, atol=1e-6)
