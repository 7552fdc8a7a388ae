"""Images per second of data loaders, as ratios within one run, and the time and memory of large data sets.

    python benchmarks/loaders.py                  # CUB from the data root, about three minutes on two cores
    python benchmarks/loaders.py --data groceries # another data set
    python benchmarks/loaders.py --long-side 0    # the files as they are

All loaders reduce images to a short side of 256 pixels, take a random resized crop of 224, mirror half of them, and
give normalised float32 batches of 150, with the same number of worker processes. "JPEG" decodes the files; the peers
are a plain torch DataLoader with the same torchvision transforms, and fastai's ImageBlock. "memory map" and "device"
decode the images once, before the measurement; "device" is measured where there is a GPU.

The time of decoding depends on the size of the files. The photographs of CUB have a long side of 500 pixels, but
reduced copies are common, so the images are first written as JPEG files of that size.

Rounds of all loaders alternate, so a slow moment of the machine affects all of them, and the medians are compared. The
first batches of a round, during which worker processes start, do not count.
"""

import argparse
import gc
import os
import tempfile
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dml_nb.data import load_dataset
from dml_nb.data.image_sets import ImageSet, RetrievalData
from dml_nb.data.loaders import set_epoch, train_loader, usable_cpus
from dml_nb.data.samplers import ClassSampler, EpochSampler
from dml_nb.models.input_spec import IMAGENET
from dml_nb.training.batches import image_dls

BATCH, SOP = 150, dict(images=59551, classes=11318)


class PlainImages(Dataset):
    "What a user of torch writes."

    def __init__(self, images):
        self.paths, self.labels = images.paths, images.labels.tolist()
        to_floats = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET.mean, IMAGENET.std)]
        crop = [v2.Resize(256), v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose([*crop, *to_floats])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.open(self.paths[i]).convert("RGB")), self.labels[i]


def resaved(images: ImageSet, long_side: int, folder: Path) -> ImageSet:
    "The same images as JPEG files whose long side has this many pixels."
    paths = [folder / str(int(label)) / f"{i}.jpg" for i, label in enumerate(images.labels)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = images.image(i)
        factor = long_side / max(image.size)
        image.resize([round(side * factor) for side in image.size]).save(path, quality=90)
    return ImageSet(images.name, images.labels, images.classes, paths=paths)


def plain(images, workers):
    "A plain torch DataLoader."
    options = dict(shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    return DataLoader(PlainImages(images), BATCH, **options)


def fastai(images, workers):
    "fastai's ImageBlock, with the reduction for each item and the crop for each item."
    from fastai.vision.all import (
        CategoryBlock,
        DataBlock,
        FlipItem,
        ImageBlock,
        IntToFloatTensor,
        Normalize,
        RandomResizedCrop,
        Resize,
    )

    label = {str(path): label for path, label in zip(images.paths, images.labels.tolist())}
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_items=lambda _: [Path(path) for path in images.paths],
        get_y=lambda path: label[str(path)],
        splitter=lambda items: (range(len(items)), range(1)),
        item_tfms=[Resize(256), RandomResizedCrop(224, min_scale=0.08), FlipItem(0.5)],
        batch_tfms=[IntToFloatTensor, Normalize.from_stats(IMAGENET.mean, IMAGENET.std)],
    )
    return block.dataloaders("", bs=BATCH, num_workers=workers).train


def ours(data, workers, storage):
    "The training loader of `image_dls`."
    return image_dls(data, IMAGENET, BATCH, workers=workers, storage=storage, resize_first=True).train


def rate(loader, batches: int, skip: int) -> float:  # images per second
    "Read some batches; the clock starts after the first ones."
    count = 0
    for n, (x, *_) in enumerate(islice(loader, batches)):
        if n == skip - 1:
            started = time.perf_counter()
        count += len(x) * (n >= skip)
    if x.is_cuda:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - started)


def measure_rates(data, workers: int, repeats: int, images: int):
    "Print the images per second of each loader and the ratios."
    loaders = {
        "torch DataLoader": plain(data.train, workers),
        "fastai ImageBlock": fastai(data.train, workers),
        "ours, JPEG": ours(data, workers, "files"),
        "ours, memory map": ours(data, workers, "memory_map"),
    }
    if torch.cuda.is_available():
        loaders["ours, device"] = ours(data, workers, "device")
    rates = {name: [] for name in loaders}
    for number in range(repeats):
        for name, loader in loaders.items():
            skip = 2 + 2 * workers  # more batches than the workers have prepared in advance
            factor = 4 if "memory" in name or "device" in name else 1
            batches = min(len(loader), skip + factor * images // BATCH)
            if name.startswith("ours"):
                set_epoch(loader, number)
            rates[name].append(rate(loader, batches, skip))
            if hasattr(loader, "_iterator"):
                loader._iterator = None  # ends the workers, which would go on reading in advance
            gc.collect()
    medians = {name: median(values) for name, values in rates.items()}
    for name, value in medians.items():
        spread = f"{min(rates[name]):,.0f} to {max(rates[name]):,.0f}"
        print(f"{name:20} {value:8,.0f} images/s  ({spread})")
    peer = max(medians["torch DataLoader"], medians["fastai ImageBlock"])
    print(f"JPEG / best peer       {medians['ours, JPEG'] / peer:.2f}  (aim: at least 0.95)")
    print(f"memory map / best peer {medians['ours, memory map'] / peer:.2f}  (aim: at least 3)")
    if "ours, device" in medians:
        print(f"device                 {medians['ours, device']:,.0f} images/s  (aim: at least 20,000 on an H100)")


def measure_large():
    "Print the time to start an epoch and the memory of a data set object at the size of SOP."
    labels = torch.arange(SOP["images"]) % SOP["classes"]
    folders = [
        f"/data/Stanford_Online_Products/{kind}_final" for kind in ("bicycle", "cabinet", "chair", "coffee_maker")
    ]
    tracemalloc.start()
    paths = [Path(f"{folders[i % 4]}/{i % SOP['classes']:012d}_{i}.JPG") for i in range(SOP["images"])]
    images = ImageSet("train", labels.clone(), [str(c) for c in range(SOP["classes"])], paths=paths)
    for path in paths:
        str(path)  # a path keeps its text
    other = ImageSet("test", [0, 0], ["other"], paths=["/a", "/b"])
    data = RetrievalData("sop", images, other)
    size = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    print(f"data set object       {size:.0f} MiB for {len(data.train):,} images  (aim: below 50)")
    for name, sampler in (("random", EpochSampler(len(labels), BATCH)), ("classes", ClassSampler(labels, BATCH, 5))):
        loader, times = train_loader(images, BATCH, sampler=sampler), []
        for epoch in range(7):
            started = time.perf_counter()
            set_epoch(loader, epoch)
            next(iter(loader._index_sampler))
            times.append(time.perf_counter() - started)
        print(f"start of an epoch     {1000 * min(times):.1f} ms, {name}, {len(labels):,} images  (aim: below 50)")


def main():
    global BATCH
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cub", help="a data set of image files")
    parser.add_argument("--workers", type=int, default=usable_cpus(), help="worker processes of each loader")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all loaders")
    parser.add_argument("--images", type=int, default=600, help="images of a round; decoded images: four times as many")
    parser.add_argument("--classes", type=int, default=40, help="training classes that are used")
    parser.add_argument("--long-side", type=int, default=500, help="of the JPEG files, in pixels; 0: as they are")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a batch")
    args = parser.parse_args()
    BATCH = args.batch
    print(f"{args.workers} workers, batches of {BATCH}, torch {torch.__version__}, numpy {np.__version__}")
    measure_large()
    whole = load_dataset(args.data)
    data = whole.subset(min(args.classes, len(whole.train.classes)), 2)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DML_NB_CACHE"] = cache
        if args.long_side:
            parts = [resaved(part, args.long_side, Path(cache) / part.name) for part in (data.train, data.test)]
            data = RetrievalData(data.name, *parts)
        measure_rates(data, args.workers, args.repeats, args.images)


if __name__ == "__main__":
    main()
