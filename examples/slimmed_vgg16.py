"""draft"""

import argparse, sys, torch, torch_pruning as tp
from pathlib import Path
from timm.models.vgg import VGG
from torch import nn
import images as im
from run_folder import RunFolder
from training import Schedule, train, finish
from isw_plugin.toolkits.torch_pruning import SlimmingImportance

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOL_AFTER = (1, 3, 6, 9, 12)


def vgg16(widths, num_classes):
    layers = []
    for i, w in enumerate(widths):
        layers.append(w)
        if i in POOL_AFTER:
            layers.append("M")
    model = VGG(cfg=layers, num_classes=num_classes, mlp_ratio=1 / 4096, norm_layer=nn.BatchNorm2d)
    model.pre_logits = nn.Identity()
    model.head.fc = nn.Linear(widths[-1], num_classes)
    return model


if __name__ == "__main__":
    out = Path(sys.argv[2])
    epochs = int(sys.argv[3])
    data = sys.argv[1]
    l1 = float(sys.argv[4])
    width = float(sys.argv[5])
    batch = int(sys.argv[6])
    dev = torch.device("cpu")
    splits = im.load(data, 32, 0)
    settings = dict(data=data)
    run = RunFolder(out, settings)
    torch.manual_seed(0)
    model = vgg16([max(8, int(w * width)) for w in WIDTHS], len(splits.classes)).to(memory_format=torch.channels_last)
    slim = tp.pruner.BNScalePruner(
        model,
        torch.randn(1, 3, 32, 32),
        importance=SlimmingImportance(),
        reg=l1,
        global_pruning=True,
        pruning_ratio=0.67,
        ignored_layers=[model.head.fc],
    )
    train(
        model,
        splits,
        Schedule(epochs, 0.1, batch),
        run,
        "dense",
        seed=0,
        device=dev,
        after_backward=lambda: slim.regularize(model),
    )
    correct = (
        sum((model(x).argmax(1) == y).sum().item() for x, y in im.Batches(splits.test, splits, 256, dev))
        if not torch.set_grad_enabled(False)
        else 0
    )
    print("dense acc", correct / len(splits.test))
    finish(model, run, "dense", accuracy=correct / len(splits.test))
    slim.step()
    print([m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    correct = sum((model(x).argmax(1) == y).sum().item() for x, y in im.Batches(splits.test, splits, 256, dev))
    print("slimmed acc", correct / len(splits.test))
