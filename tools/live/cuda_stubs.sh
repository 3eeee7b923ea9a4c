#!/bin/bash
# usage: cuda_stubs.sh SITE_PACKAGES      (part of setup.sh)
# The registry's torch wheel for Linux is the CUDA build: it is linked to 2 GB of
# CUDA libraries that a machine without a GPU never calls. Put small stubs in
# their place. The CUDA runtime itself (nvidia-cuda-runtime, 2 MB) is the real
# one, so torch.cuda.is_available() answers False as it should.
set -euo pipefail
lib=$1/torch/lib
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# soname, then the pattern of its symbols as nm writes them (name@version)
stubs='
libcublas.so.13      ^cublas.*@libcublas.so.13$
libcublasLt.so.13    ^cublasLt.*@libcublasLt.so.13$
libcudnn.so.9        ^cudnn.*@libcudnn.so.9$
libcufft.so.12       ^cufft.*@libcufft.so.12$
libcufile.so.0       ^cuFile
libcupti.so.13       ^cupti.*@libcupti.so.13$
libcurand.so.10      ^curand
libcusolver.so.12    ^cusolver.*@libcusolver.so.12$
libcusparse.so.12    ^cusparse.*@libcusparse.so.12$
libcusparseLt.so.0   ^cusparseLt[^@]*$
libnccl.so.2         ^nccl
libnvrtc.so.13       ^nvrtc.*@libnvrtc.so.13$
libnvshmem_host.so.3 ^nvshmem
'
while read -r soname _; do [ -z "$soname" ] || rm -f "$lib/$soname"; done <<< "$stubs"
nm -D --undefined-only --with-symbol-versions "$lib"/libtorch*.so "$lib"/libc10_cuda.so "$lib"/libcaffe2_nvrtc.so |
  sed -nE 's/^ +[UVwv] ([A-Za-z0-9_@.]+).*/\1/p' | sort -u > "$work/all"
while read -r soname pattern; do
  [ -n "$soname" ] || continue
  grep -E "$pattern" "$work/all" > "$work/syms" || true
  # 999 is an error code in each of these libraries
  sed -E 's/@.*//; s/.*/int &(void){return 999;}/' "$work/syms" | sort -u > "$work/s.c"
  sed -nE 's/.*@//p' "$work/syms" | sort -u | while read -r v; do
    echo "$v { global: $(grep -F "@$v" "$work/syms" | sed 's/@.*/;/' | tr '\n' ' ') };"
  done > "$work/s.map"
  [ -s "$work/s.map" ] && script="-Wl,--version-script=$work/s.map" || script=
  cc -shared -nostdlib -w -Wl,-soname,"$soname" $script -o "$lib/$soname" "$work/s.c"
done <<< "$stubs"
