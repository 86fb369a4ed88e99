#!/usr/bin/env bash
# Distils a published teacher with the settings of the paper, or the embedded one in minutes:
#
#   bash run_sid.sh cifar10-uncond | cifar10-cond | imagenet64-cond | ffhq64 | afhq64-v2 | demo  [sid_train.py options]
#
# NPROC=8 bash run_sid.sh ...   sets the number of processes (default: the GPUs; on a CPU: two).
set -euo pipefail
cd "$(dirname "$0")"

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 1 ] || usage
recipe=$1
shift

published="--precond=edm --tmax=800 --init_sigma=2.5 --ls=1 --lsg=100 --snap=50 --dump=500 --metrics=fid50k_full"

# Teacher, then the settings; durations in Mimg. FID of the published result: 1.923, 1.710, 1.524, 1.550, 1.628.
case $recipe in
cifar10-uncond)
    options="--edm_model=edm-cifar10-32x32-uncond-vp $published --arch=ddpmpp --data_stat=cifar10-32x32 --cond=0 --cres=2,2,2
        --alpha=1.2 --batch=256 --batch-gpu=16 --lr=1e-5 --glr=1e-5 --fp16=0 --dropout=0.13 --augment=0.12
        --ema=0.5 --tick=10 --duration=500" ;;
cifar10-cond)
    options="--edm_model=edm-cifar10-32x32-cond-vp $published --arch=ddpmpp --data_stat=cifar10-32x32 --cond=1 --cres=2,2,2
        --alpha=1.2 --batch=256 --batch-gpu=16 --lr=1e-5 --glr=1e-5 --fp16=0 --dropout=0.13 --augment=0.12
        --ema=0.5 --tick=10 --duration=800" ;;
imagenet64-cond)
    options="--edm_model=edm-imagenet-64x64-cond-adm $published --arch=adm --data_stat=imagenet-64x64 --cond=1 --cres=1,2,3,4
        --alpha=1.2 --batch=8192 --batch-gpu=16 --lr=4e-6 --glr=4e-6 --fp16=1 --dropout=0.10 --augment=0
        --ema=2 --tick=20 --duration=1000" ;;
ffhq64)
    options="--edm_model=edm-ffhq-64x64-uncond-vp $published --arch=ddpmpp --data_stat=ffhq-64x64 --cond=0 --cres=1,2,2,2
        --alpha=1.2 --batch=512 --batch-gpu=32 --lr=1e-5 --glr=1e-5 --g_beta1=0.9 --fp16=1 --dropout=0.05
        --augment=0.15 --ema=0.5 --tick=10 --duration=500" ;;
afhq64-v2)
    options="--edm_model=edm-afhqv2-64x64-uncond-vp $published --arch=ddpmpp --data_stat=afhqv2-64x64 --cond=0 --cres=1,2,2,2
        --alpha=1.0 --batch=512 --batch-gpu=32 --lr=5e-6 --glr=5e-6 --fp16=1 --dropout=0.05 --augment=0.15
        --ema=0.5 --tick=10 --duration=500" ;;
demo)
    demo=assets/fashion-mnist-16
    options="--edm_model=$demo/teacher.safetensors --data_stat=$demo/reference.npz --metrics=fid5k --metrics-batch=250
        --score-gradient=off --sigma-schedule=lognormal --share-noise=1 --batch=32 --batch-gpu=16 --lr=4e-4 --glr=4e-4
        --lr-decay=cosine --ema-rampup=0.5 --duration=0.02 --tick=1 --snap=5 --dump=10 --desc=demo" ;;
*) usage ;;
esac

source ./setup_env.sh "" "import torch, numpy, scipy, PIL, click, requests, psutil, tqdm, safetensors"
if [ -z "${NPROC:-}" ]; then
    NPROC=$("$PYTHON" -c 'import os, torch; print(torch.cuda.device_count() or min(2, os.cpu_count() or 1))')
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The recipe's options come first, so that those given on the command line win.
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" sid_train.py $options "$@"

if [ "$recipe" = demo ]; then
    case " $* " in *" -n "* | *" --dry-run "* | *--outdir* | *--nosubdir*) exit 0 ;; esac
    "$PYTHON" -m sid.report "$(ls -d training-runs/[0-9]*-demo | tail -n 1)"
fi
