"""Seeded errors: one small change of the framework each, with the test files of the default run that must fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One seeded error."""

    name: str
    """What is wrong."""
    path: str
    """The file that is changed, below megatron/."""
    old: str
    """Text that the file has exactly once."""
    new: str
    """Text in its place."""
    tests: tuple[str, ...]
    """Test files, of which at least one must fail, below tests/."""


D, TP = "distributed", "distributed/tensor_parallel"

MUTANTS = (
    # tensor, sequence and context parallelism
    Mutant(
        "no all-reduce of gradients where a tensor-parallel region begins",
        f"{D}/collectives.py",
        "with_grad(x, axis, identity, all_reduced)",
        "with_grad(x, axis, identity, identity)",
        ("distributed/test_layers.py",),
    ),
    Mutant(
        "a second all-reduce of gradients where a tensor-parallel region ends",
        f"{D}/collectives.py",
        "with_grad(x, axis, all_reduced, identity)",
        "with_grad(x, axis, all_reduced, all_reduced)",
        ("distributed/test_layers.py",),
    ),
    Mutant(
        "wrong sign in the log-sum over ranks",
        f"{TP}/cross_entropy.py",
        "ranks[0::2].logsumexp(0)",
        "ranks[0::2].neg().logsumexp(0)",
        ("distributed/test_cross_entropy.py",),
    ),
    Mutant(
        "padding of the vocabulary has probability on later ranks",
        f"{TP}/cross_entropy.py",
        "vocabulary - axis.rank * rows.shape[1]",
        "vocabulary",
        ("distributed/test_cross_entropy.py",),
    ),
    Mutant(
        "off-by-one in the first token of a vocabulary shard",
        f"{TP}/embedding.py",
        "self.axis.rank * (vocab_size // self.axis.size)",
        "self.axis.rank * (vocab_size // self.axis.size + 1)",
        ("distributed/test_layers.py",),
    ),
    Mutant(
        "the bias of a row-parallel layer is added once a rank",
        f"{TP}/linear.py",
        "else total + self.bias",
        "else total + self.bias * self.axis.size",
        ("distributed/test_layers.py",),
    ),
    Mutant(
        "a dropped gradient where the sequence is gathered twice",
        f"{TP}/sequence_parallel.py",
        "grads[0].chunk(axis.size)[axis.rank] + reduce_scatter_first(grads[1], axis)",
        "reduce_scatter_first(grads[1], axis)",
        ("model/test_mixers.py", "end_to_end/test_experts.py"),
    ),
    Mutant(
        "a rank takes the wrong shard of the sequence",
        f"{D}/context_parallel/sequence_shards.py",
        "x.chunk(self.context.size, dim=1)[self.context.rank]",
        "x.chunk(self.context.size, dim=1)[self.context.rank - 1]",
        ("engine/test_token_mean.py", "end_to_end/test_documents.py"),
    ),
    Mutant(
        "tensor-parallel ranks drop the same features",
        f"{D}/rng_tracker.py",
        'parameter_seed(seed, rank, "sharded")',
        'parameter_seed(seed, 0, "sharded")',
        ("model/test_sequence_dropout.py", "distributed/test_layers.py"),
    ),
    Mutant(
        "all layers start from the same weights",
        f"{D}/param_init.py",
        "parameter_seed(self.seed, self.layer, self.prefix + name)",
        "parameter_seed(self.seed, 0, self.prefix + name)",
        ("distributed/test_seeds.py",),
    ),
    # attention and positions
    Mutant(
        "a query sees the next key",
        "kernels/attention.py",
        ".tril(keys - queries)",
        ".tril(keys - queries + 1)",
        ("kernels/test_attention.py",),
    ),
    Mutant(
        "the first token of a document is not seen",
        "kernels/attention.py",
        ">= starts[:, None, :, None]",
        "> starts[:, None, :, None]",
        ("kernels/test_attention.py", "model/test_documents.py"),
    ),
    Mutant(
        "a window is one key too wide",
        "kernels/attention_patterns.py",
        "keys > queries - self.width",
        "keys >= queries - self.width",
        ("kernels/test_attention_patterns.py",),
    ),
    Mutant(
        "a package's window is one key too wide",
        "kernels/flash_attention.py",
        "else view.pattern.width - 1",
        "else view.pattern.width",
        ("kernels/test_flash_attention.py",),
    ),
    Mutant(
        "packages do not get the slopes of ALiBi",
        "kernels/flash_attention.py",
        '"alibi_slopes": request.slopes',
        '"alibi_slopes": None',
        ("kernels/test_flash_attention.py",),
    ),
    Mutant(
        "the first document of a row is joined to the row before",
        "kernels/documents.py",
        "first = starts == torch.arange(length, device=starts.device)",
        "first = (starts == torch.arange(length, device=starts.device)) & (starts > 0)",
        ("kernels/test_flash_attention.py",),
    ),
    Mutant(
        "Triton's softmax does not scale the scores",
        "kernels/softmax_attention.py",
        "alpha=1 / math.sqrt(size)",
        "alpha=1.0",
        ("kernels/triton/test_softmax_attention.py",),
    ),
    Mutant(
        "flash-attn serves in fp32",
        "registry/attention.py",
        "if facts.kernels.dtype not in (FP16, BF16):",
        "if facts.kernels.dtype in ():",
        ("kernels/test_attention_backends.py",),
    ),
    Mutant(
        "wrong sign in the gradient of rotary positions",
        "kernels/rotary.py",
        "_turn(grads[0], cos, sin, back=True)",
        "_turn(grads[0], cos, sin)",
        ("kernels/test_rotary_and_norms.py",),
    ),
    Mutant(
        "YaRN scales the fast pairs",
        "model/positions/rope_frequencies.py",
        "plain / factor * scaled_part + plain * (1 - scaled_part)",
        "plain * scaled_part + plain / factor * (1 - scaled_part)",
        ("model/test_positions_against_transformers.py",),
    ),
    Mutant(
        "wrong slopes of ALiBi",
        "model/positions/alibi.py",
        "2 ** (-8 * number /",
        "2 ** (-4 * number /",
        ("model/test_positions_against_transformers.py", "model/test_options.py"),
    ),
    Mutant(
        "cached keys are stored one position late",
        "model/kv_cache.py",
        "torch.arange(positions, device=device)  # [b, s]",
        "torch.arange(1, positions + 1, device=device)  # [b, s]",
        ("model/test_kv_cache.py",),
    ),
    # blocks
    Mutant(
        "Mamba's state is not reset at a document",
        "kernels/scan.py",
        "keep = keep.masked_fill(resets[:, :, None, None], 0)",
        "keep = keep.masked_fill(resets[:, :, None, None], 1)",
        ("model/test_mixers.py",),
    ),
    Mutant(
        "the router's z-loss is not squared",
        "model/moe/losses.py",
        "logits.logsumexp(dim=-1).square()",
        "logits.logsumexp(dim=-1)",
        ("model/test_mixture.py",),
    ),
    Mutant(
        "padding takes the slots of experts",
        "model/moe/layer.py",
        "self._slots(len(tokens)), real)",
        "self._slots(len(tokens)))",
        ("model/test_mixture.py",),
    ),
    Mutant(
        "the load-balance loss is not scaled by the number of experts",
        "model/moe/losses.py",
        "return len(counts) * (",
        "return (",
        ("model/test_mixture.py",),
    ),
    Mutant(
        "the router's probabilities are logits",
        "model/moe/router.py",
        "scores = logits if late else",
        "scores = logits if True else",
        ("model/test_mixture.py",),
    ),
    # data
    Mutant(
        "data-parallel ranks overlap",
        "data/dataset/sampler.py",
        "self.data_rank * self.micro_batch",
        "self.data_rank",
        ("data/test_sampler.py",),
    ),
    Mutant(
        "off-by-one in the number of passes",
        "data/dataset/index_map.py",
        "-(-(samples * seq_length + 1)",
        "-(-(samples * seq_length)",
        ("data/test_index_map.py",),
    ),
    Mutant(
        "the loss mask is inverted at document ends",
        "data/dataset/batch.py",
        "counts = tokens != eod if",
        "counts = tokens == eod if",
        ("data/test_loader.py",),
    ),
    Mutant(
        "a document starts one token early",
        "data/dataset/document_starts.py",
        "first[:, 1:] |= tokens[:, :-1] == eod",
        "first[:, 1:] |= tokens[:, 1:] == eod",
        ("data/test_labels.py", "end_to_end/test_documents.py"),
    ),
    Mutant(
        "a dropped label mask",
        "data/dataset/batch.py",
        "loss_mask *= counted",
        "loss_mask *= 1",
        ("data/test_labels.py",),
    ),
    Mutant(
        "wrong sign in the blend",
        "data/dataset/blend.py",
        "weights[candidate] * seen - counts[candidate]",
        "weights[candidate] * seen + counts[candidate]",
        ("data/test_blend.py",),
    ),
    Mutant(
        "splits overlap where their shares are rounded up",
        "data/dataset/splits.py",
        "surplus = bounds[-1] - documents",
        "surplus = 0 * bounds[-1]",
        ("data/test_splits.py",),
    ),
    Mutant(
        "offsets of items point to their ends",
        "data/indexed/writer.py",
        "((ends - sizes) * self.dtype.itemsize)",
        "(ends * self.dtype.itemsize)",
        ("data/test_indexed.py",),
    ),
    # engine and optimizers
    Mutant(
        "the loss is divided by too many tokens",
        "engine/loss_normalization.py",
        "/ (len(batches) * topology.dp_cp.size)",
        "/ len(batches)",
        ("engine/test_token_mean.py",),
    ),
    Mutant(
        "optimizer state is restored from the wrong range",
        "checkpoint/format/optimizer_shards.py",
        "full.narrow(shape.shard_dim, start, stop - start)",
        "full.narrow(shape.shard_dim, offset, stop - start)",
        ("checkpoint/test_optimizer_shards.py", "checkpoint/test_weight_shards.py"),
    ),
    Mutant(
        "warm-up starts at zero",
        "optim/lr_schedule.py",
        " / self.warmup",
        " / (self.warmup + 1)",
        ("optim/test_lr_schedule.py",),
    ),
    Mutant(
        "the cosine decay runs twice as fast",
        "optim/lr_schedule.py",
        "math.cos(math.pi * point.progress)",
        "math.cos(2 * math.pi * point.progress)",
        ("optim/test_lr_schedule.py",),
    ),
    Mutant(
        "weight decay grows with muP's factor",
        "optim/param_groups.py",
        "0.0 if exempt else weight_decay / ",
        "0.0 if exempt else weight_decay * ",
        ("optim/test_param_groups.py",),
    ),
    Mutant(
        "small gradients are scaled up to the largest norm",
        "optim/grad_clip.py",
        "(self.norm + 1e-6), max=1.0)",
        "(self.norm + 1e-6), max=1e9)",
        ("optim/test_grad_clip.py",),
    ),
    Mutant(
        "Adam's bias correction is undone the wrong way",
        "optim/adam.py",
        'group["lr"] *= first / second',
        'group["lr"] *= second / first',
        ("optim/test_optimizers.py",),
    ),
    # training, inference, checkpoints
    Mutant(
        "exit_duration counts seconds",
        "training/intervals.py",
        "elapsed_seconds >= 60.0 * duration_minutes",
        "elapsed_seconds >= duration_minutes",
        ("training/test_intervals.py",),
    ),
    Mutant(
        "a falling loss is a spike",
        "training/loss_guard.py",
        "loss > self.spike_factor * self._mean",
        "loss < self.spike_factor * self._mean",
        ("training/test_loss_guard.py",),
    ),
    Mutant(
        "the repetition penalty rewards",
        "inference/sampling.py",
        "torch.where(scores > 0, scores / penalty, scores * penalty)",
        "torch.where(scores > 0, scores * penalty, scores / penalty)",
        ("inference/test_sampling.py",),
    ),
    Mutant(
        "one token more than asked for",
        "inference/token_loop.py",
        "token in self._limits.ends or len(self.tokens) >= self._end",
        "token in self._limits.ends or len(self.tokens) > self._end",
        ("inference/test_token_loop.py", "inference/test_generate.py"),
    ),
    Mutant(
        "a window of scoring is one token too short",
        "inference/scoring.py",
        "max(0, end - 1 - max_length)",
        "max(0, end - max_length)",
        ("inference/test_scoring.py", "evaluation/test_perplexity.py"),
    ),
    Mutant(
        "the halves of a gated MLP are exchanged on import",
        "checkpoint/huggingface/llama.py",
        '("mlp.up_proj", "mlp.gate_proj")',
        '("mlp.gate_proj", "mlp.up_proj")',
        ("checkpoint/huggingface/test_conversion.py",),
    ),
    Mutant(
        "a norm over all heads leaves out the heads of other ranks",
        "model/norms/across_heads.py",
        "with_grad(squares, self.axis, all_reduced, all_reduced)",
        "self.axis.size * squares",
        ("checkpoint/huggingface/test_dense_families.py",),
    ),
    Mutant(
        "rotated pairs are not reordered on import",
        "checkpoint/huggingface/cohere2.py",
        "pairs_interleaved=True",
        "pairs_interleaved=False",
        ("checkpoint/huggingface/test_conversion.py",),
    ),
    Mutant(
        "a damaged file passes the hash",
        "checkpoint/format/integrity.py",
        "elif contents and files.digest(path) != ",
        "elif contents and not files.digest(path) and None != ",
        ("checkpoint/test_damage.py",),
    ),
    Mutant(
        "the plan does not shard the optimizer's state",
        "plan/memory.py",
        "count, share = _held(*trained, layout)",
        "count, share = trained[0], sum(trained)",
        ("plan/test_plan.py", "plan/test_live_memory.py"),
    ),
)
