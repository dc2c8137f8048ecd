"""TransformerLens keeping the top k of every neuron, run by its own interpreter for
`benchmarks.harvest`.

    python transformer_lens_top_k.py MODEL_FOLDER K

Reads one JSON batch of token ids a line, `[[...], ...]`, and answers `{"seconds": ...,
"processor_seconds": ...}`; the line `null` is answered with the sum of the values kept in each
layer. It keeps values and the numbers of sequences, by the largest activation of each; no
activations of tokens. The unembedding is left out.
"""

import json
import sys
import time

import torch
from transformer_lens_sweep import load  # type: ignore[import-not-found]


def main() -> None:
    torch.set_grad_enabled(False)
    model, k = load(sys.argv[1]), int(sys.argv[2])
    layers, neurons = model.cfg.n_layers, model.cfg.d_mlp
    values = [torch.full((0, neurons), -torch.inf) for _ in range(layers)]
    numbers = [torch.zeros(0, neurons, dtype=torch.long) for _ in range(layers)]
    seen = 0

    def keep(activations: torch.Tensor, hook: object) -> None:
        layer = hook.layer()  # type: ignore[attr-defined]
        largest = activations.amax(1)
        own = torch.arange(seen, seen + len(largest))[:, None].expand_as(largest)
        joined = torch.cat((values[layer], largest))
        values[layer], places = torch.topk(joined, min(k, len(joined)), dim=0)
        numbers[layer] = torch.cat((numbers[layer], own)).gather(0, places)

    hooks = [(f"blocks.{layer}.mlp.hook_post", keep) for layer in range(layers)]
    print(json.dumps({"ready": True, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        if batch is None:
            print(json.dumps([float(each.double().sum()) for each in values]), flush=True)
            continue
        started, begun = time.perf_counter(), time.process_time()
        model.run_with_hooks(torch.tensor(batch), fwd_hooks=hooks, stop_at_layer=layers)
        seen += len(batch)
        wall, processors = time.perf_counter() - started, time.process_time() - begun
        print(json.dumps({"seconds": wall, "processor_seconds": processors}), flush=True)


if __name__ == "__main__":
    main()
