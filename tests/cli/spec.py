"""The small spec of these tests."""

SPEC = """\
name = "small"
[backbone]
source = "cifar"
name = "resnet8"
arguments = { in_chans = 1 }
input = [1, 8, 8]
[[pass]]
use = "freeze"
select = ["conv1", "bn1"]
[data]
train_limit = 40
eval_limit = 20
[train]
epochs = 2
batch = 20
"""
