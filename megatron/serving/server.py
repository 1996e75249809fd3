"""The text service: the wiring, in order.

The main thread of every rank decodes; on the first rank a second thread answers HTTP. SIGTERM or Ctrl-C lets requests
that have been taken finish, and then ends the service; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import threading
from pathlib import Path

import torch.distributed as dist

from megatron.config import Config
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import device
from megatron.engine.engine import Engine
from megatron.engine.vocabulary import vocabulary_size
from megatron.errors import ConfigError, RunError
from megatron.inference.runner import (
    context_length,
    drafter_of,
    loop_maker,
    own_sampling,
    with_loaded_model,
)
from megatron.launcher.worker import Stop
from megatron.log import get_logger
from megatron.metrics.memory import total_memory_bytes
from megatron.param_table import ModelDims
from megatron.serving.cache_size import CacheSize, check_cache
from megatron.serving.scheduler import ModelWorker, SchedulerStep, Service, run_follower
from megatron.tokenizers.base import Tokenizer

FLUSH_SECONDS = 10.0
"""How long the last answers may take to reach their clients."""


def serve(config: Config, stop: Stop) -> None:
    """Serves the model of the checkpoint that `load` names until asked to stop. Collective over all ranks.

    Raises ConfigError for a missing package, an open address without a key, or more texts than the memory holds, before
    the model is loaded.
    """
    config = config.for_inference(drafts=True)
    section = config.generation
    _check(section.serve_host, section.serve_key)
    size = CacheSize(
        ModelDims.of(config.model, config.moe, config.mixers),
        rows=section.generation_batch_size,
        length=context_length(config),
        width=4 if config.precision.precision == "fp32" else 2,
        pipe_size=config.parallelism.pipe_parallel_size or 1,
        model_size=config.parallelism.model_parallel_size,
        modules=config.model.mtp_num_layers or 0,
    )
    check_cache(size, total_memory_bytes(device()))

    def work(engine: Engine, tokenizer: Tokenizer, topology: Topology) -> None:
        stop.listen()  # the launcher signals every rank; rank 0 ends the service
        alone = topology.world_size == 1
        drafter = drafter_of(engine)
        worker = ModelWorker(
            engine,
            tokenizer,
            rows=section.generation_batch_size,
            max_length=context_length(config),
            alone=alone,
            make=loop_maker(config, drafter, tokenizer),
        )
        if topology.rank != 0:
            run_follower(worker, _hear)
            return
        counts = None if drafter is None else drafter.counts
        service = Service(worker, section.serve_max_waiting, publish=_publish, drafts=counts)
        _answer_http(config, service, tokenizer, stop)

    with_loaded_model(config, work)


def _check(host: str, key: str | None) -> None:
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError.of(
                f"serving needs the package {package}, which is not installed", hint="pip install 'neox[serve]'"
            )
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and not key:
        raise ConfigError.of(
            "others can reach this address, so requests must carry a key",
            key="serve_host",
            value=host,
            hint="set serve_key, or serve_host: 127.0.0.1",
        )


def _answer_http(config: Config, service: Service, tokenizer: Tokenizer, stop: Stop) -> None:
    """Decodes here and answers in another thread, until asked to stop."""
    import uvicorn

    from megatron.serving.api import build_app
    from megatron.serving.api_context import ApiContext
    from megatron.serving.chat_rendering import Conversations

    section = config.generation
    name = Path(config.checkpoint.load or "model").name
    length, ends = context_length(config), tuple(section.eos_token_ids or ())
    named = config.tokenizer
    desk = ApiContext(
        service,
        tokenizer,
        name,
        length,
        section.serve_key,
        config.training.seed,
        ends,
        sampling=own_sampling(config),
        stops=tuple(section.stop or ()),
        maximum_tokens=section.maximum_tokens,
        vocabulary=vocabulary_size(config, tokenizer),
        conversations=Conversations.of_tokenizer(named.tokenizer_type, named.vocab_file),
    )
    listening = _listen(section.serve_host, section.serve_port)
    settings = uvicorn.Config(
        build_app(desk), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=10
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="http", daemon=True)
    thread.start()
    host, port = listening.getsockname()[:2]
    get_logger(__name__).info("serving on http://%s:%d", host, port)
    try:
        service.run(closing=lambda: stop.requested or not thread.is_alive())
    finally:
        server.should_exit = True
        thread.join(FLUSH_SECONDS)
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises RunError when the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RunError.of(
            f"cannot listen on {host}:{port} ({error.strerror or os.strerror(error.errno or 0)})",
            key="serve_port",
            value=port,
            hint="choose another port with --serve-port",
        ) from error


def _publish(orders: SchedulerStep) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list([orders], src=0)


def _hear() -> SchedulerStep:
    held: list[SchedulerStep] = [SchedulerStep()]
    dist.broadcast_object_list(held, src=0)
    return held[0]
