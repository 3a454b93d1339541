#!/bin/bash
# Before, at the root of the tree, with a network: fills .gpu/, which git
# ignores, with what the machine lacks: wheels for Python 3.12, and CIFAR-10.
#   bash benchmarks/gpu/prepare.sh DATA    DATA: the folder of tfds' cifar10/
# Python with pip: $PYTHON, or python3.
set -eu
python=${PYTHON:-python3}
data=${1:?expected DATA, the folder in which tfds has cifar10/}
mkdir -p .gpu/wheels
wheels=(
  array_record==0.8.6 clu==0.0.12 dm-tree==0.1.10 docstring-parser==0.18.0
  googleapis-common-protos==1.76.0 immutabledict==4.3.1
  importlib_resources==7.1.0 ml-collections==1.1.0 protobuf==7.36.2
  simple_parsing==0.1.9 tensorboardX==2.6.5 tensorflow-datasets==4.9.10
  tensorflow-metadata==1.21.0 termcolor==3.3.0 toml==0.10.2
  # For PyTorch's side.
  vector-quantize-pytorch==1.32.0 torch-einops-utils==0.2.0 einx==0.4.3
  frozendict==2.5.1 loguru==0.7.3
)
platforms=()
for tag in _2_28 _2_27 _2_24 _2_17 2014 1; do
  platforms+=(--platform "manylinux${tag}_x86_64")
done
"$python" -m pip download -qq --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  "${platforms[@]}" -d .gpu/wheels "${wheels[@]}"
# promise comes as source alone; its wheel is for any Python.
"$python" -m pip wheel -qq --no-deps -w .gpu/wheels promise==2.3
# 53 MB are 20 MB, since all JPEGs have one header.
tar c -C "$data" --transform 's,^,tfds/,' cifar10 | xz -6 > .gpu/cifar10.tar.xz
du -sh .gpu
