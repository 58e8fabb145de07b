"""MNIST, 1 of 3: half of the weights set to zero, then ever more, up to 90% on a polynomial schedule.

    python examples/mnist_compression/prune.py [--fast]

As in TensorFlow's tutorial of pruning, but with a teacher: the dense network itself. Zeros stay in dense tensors, so
that the network is not faster, and its file is smaller only when it is packed (gzip). To take whole channels out, which
is faster too: textbrewer.compression.prune_channels.
"""

import copy
import gzip

from digits import accuracy, distil, parse, read, train

from textbrewer import compression
from textbrewer.compression.weights import GradualSparsity, SparsePruning

PLAN = SparsePruning(0.9, modules=["convolution", "dense", "inner", "head"])


def packed(model, folder):
    """Return the kilobytes of a model's file when it is packed."""
    compression.save(model, folder)
    return len(gzip.compress((folder / "model.safetensors").read_bytes())) / 1000


def main():
    options = parse(__doc__, "prune")
    rows, held_out = read()
    dense = train(rows, options)

    at_once = PLAN.apply(dense)
    student = copy.deepcopy(dense)
    gradual = GradualSparsity(PLAN, schedule="cubic", initial=0.5, begin=0.0, end=0.7, every=10)
    distil(dense, student, rows, options, "sparse", step_callbacks=[gradual])

    print(f"{'':24}zeros, %  accuracy  packed, kB")
    models = [("dense", dense, 0.0), ("90% at once", at_once.model, at_once.sparsity()["weights"])]
    models.append(("50% to 90%, distilled", student, gradual.sparse.sparsity()["weights"]))
    for name, model, zeros in models:
        size = packed(model, options.output / name.split(",")[0].replace("%", ""))
        print(f"{name:24}{100 * zeros:8.1f}  {accuracy(model, held_out):8.1f}  {size:10.1f}")


if __name__ == "__main__":
    main()
