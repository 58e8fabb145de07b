"""MNIST, 2 of 3: the dense layers in int8, after training, and by distillation that rounds as int8 does.

    python examples/mnist_compression/quantize.py [--fast]

torchao rounds (extra qat); convolutions and the last layer stay as they are. Both models are saved and loaded again.
"""

import copy

import torch
from digits import Net, accuracy, distil, parse, read, train

from textbrewer import compression
from textbrewer.compression.quantization import convert_qat_, prepare_qat_, quantize_


def main():
    options = parse(__doc__, "quantize")
    rows, held_out = read()
    plain = train(rows, options)

    after = copy.deepcopy(plain)
    quantize_(after)

    trained = copy.deepcopy(plain)
    prepare_qat_(trained)
    distil(plain, trained, rows, options, "qat")
    rounding = accuracy(trained, held_out)
    convert_qat_(trained)

    with torch.no_grad():
        expected = plain(held_out[0])[0]
    print(f"in training, as if in int8: accuracy {rounding:.1f}")
    print(f"{'':24}file, kB  accuracy  largest difference of the scores")
    for name, model in [("float32", plain), ("int8 after training", after), ("int8, distilled", trained)]:
        folder = options.output / name.replace(", ", " ").replace(" ", "-")
        compression.save(model, folder)
        loaded = compression.load(folder, model=Net())
        with torch.no_grad():
            difference = (loaded(held_out[0])[0] - expected).abs().max().item()
        size = (folder / "model.safetensors").stat().st_size / 1000
        print(f"{name:24}{size:8.1f}  {accuracy(loaded, held_out):8.1f}  {difference:12.3f}")


if __name__ == "__main__":
    main()
