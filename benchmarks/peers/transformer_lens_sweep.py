"""TransformerLens ablating every head, run by its own interpreter for `benchmarks.verify`.

    python transformer_lens_sweep.py MODEL_FOLDER

Reads one JSON request a line, `{"ids": [...], "target": 1, "distractor": 2, "batch": 24}`, and
answers `{"seconds": ..., "effects": [...]}`: J(run) - J(run with the head's output zeroed), in the
order of layers, for as many heads at once as `batch` says. J is the logit difference at the last
token.
"""

import json
import sys
import time

import torch
from transformer_lens import (  # type: ignore[import-not-found]
    HookedTransformer,
    HookedTransformerConfig,
)
from transformer_lens.pretrained.weight_conversions import (  # type: ignore[import-not-found]
    convert_gpt2_weights,
)
from transformers import GPT2LMHeadModel


def load(folder: str) -> HookedTransformer:
    source = GPT2LMHeadModel.from_pretrained(folder)
    config = source.config
    hooked = HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_ctx=config.n_positions,
        d_head=config.n_embd // config.n_head,
        n_heads=config.n_head,
        d_mlp=4 * config.n_embd,
        d_vocab=config.vocab_size,
        act_fn=config.activation_function,
        eps=config.layer_norm_epsilon,
        normalization_type="LN",
        original_architecture="GPT2LMHeadModel",
        device="cpu",
    )
    model = HookedTransformer(hooked)
    model.load_state_dict(convert_gpt2_weights(source, hooked), strict=False)
    return model.eval()


def sweep(
    model: HookedTransformer, ids: list[int], target: int, distractor: int, batch: int
) -> list[float]:
    tokens = torch.tensor([ids])

    def objective(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, target] - logits[:, -1, distractor]

    value = objective(model(tokens))
    heads = [
        (layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)
    ]
    effects: list[float] = []
    for first in range(0, len(heads), batch):
        chosen = heads[first : first + batch]

        def zero(
            z: torch.Tensor, hook: object, chosen: list[tuple[int, int]] = chosen
        ) -> torch.Tensor:
            for row, (layer, head) in enumerate(chosen):
                if layer == hook.layer():  # type: ignore[attr-defined]
                    z[row, :, head] = 0
            return z

        layers = sorted({layer for layer, _ in chosen})
        logits = model.run_with_hooks(
            tokens.expand(len(chosen), -1),
            fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero) for layer in layers],
        )
        effects.extend((value - objective(logits)).tolist())
    return effects


def main() -> None:
    torch.set_grad_enabled(False)
    model = load(sys.argv[1])
    print(json.dumps({"ready": True, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        effects = sweep(model, **request)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "effects": effects}), flush=True)


if __name__ == "__main__":
    main()
