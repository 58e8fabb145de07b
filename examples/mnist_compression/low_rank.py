"""MNIST, 3 of 3: dense layers replaced by pairs of smaller ones, by the directions that matter on the images.

    python examples/mnist_compression/low_rank.py [--fast]

Of the dense layers' weights 90% go; once by the plain singular values of each matrix, once by those of its outputs on
the training images, and once the latter, distilled afterwards. All are saved and loaded again.
"""

import copy

from digits import Net, accuracy, distil, parse, read, train
from torch.utils.data import DataLoader

from textbrewer import compression
from textbrewer.compression import factorize_

SETTINGS = {"ratio": 0.9, "include": ["dense", "inner"]}


def main():
    options = parse(__doc__, "low_rank")
    rows, held_out = read()
    plain = train(rows, options)

    svd = copy.deepcopy(plain)
    factorize_(svd, method="svd", **SETTINGS)
    whitened = copy.deepcopy(plain)
    print(factorize_(whitened, DataLoader(rows, batch_size=500), **SETTINGS))
    distilled = copy.deepcopy(whitened)
    distil(plain, distilled, rows, options, "pairs")

    print(f"{'':24}parameters  file, kB  accuracy")
    models = {"dense": plain, "pairs, plain": svd, "pairs, by data": whitened, "pairs, distilled": distilled}
    for name, model in models.items():
        folder = options.output / name.replace(", ", "-").replace(" ", "-")
        compression.save(model, folder)
        loaded = compression.load(folder, model=Net())
        count = sum(parameter.numel() for parameter in loaded.parameters())
        size = (folder / "model.safetensors").stat().st_size / 1000
        print(f"{name:24}{count:10,}  {size:8.1f}  {accuracy(loaded, held_out):8.1f}")


if __name__ == "__main__":
    main()
