#!/usr/bin/env bash
# Distils a published teacher with published settings, or an embedded one in minutes:
#
#   bash run_sid.sh RECIPE [options of sid_train.py]
#
#   demo                        pictures of clothes, from noise and a class
#   demo-text                   pictures from prompts in one step and in four (--steps=N: in N alone), and what new
#                               prompts get: a small Stable Diffusion pipeline
#   auto --edm_model=TEACHER    any teacher, such as one of your own: measures the start and the levels, tries rates
#   cifar10-uncond  cifar10-cond  imagenet64-cond  ffhq64  afhq64-v2             SiD, without data
#   the same names with -sida, such as cifar10-uncond-sida --data=images.zip     SiDA, with real images
#   imagenet512-edm2-xs  …-s  …-m  …-l  …-xl  …-xxl                              SiD of EDM2's latent teachers
#   sd15  sd21  sdxl  sd35-medium  sana  flux-dev, such as sd15 --prompts=captions.txt  text to image
#
# NPROC=8 bash run_sid.sh ...   sets the number of processes (default: the GPUs; on a CPU: two).
# The other settings are in sid/recipes.py. The published trainings haven't been rerun here.
set -euo pipefail
cd "$(dirname "$0")"

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 1 ] || usage
recipe=$1
shift

case $recipe in  # teacher, duration in Mimg                                          FID published
cifar10-uncond)        teacher=edm-cifar10-32x32-uncond-vp   duration=500 ;;        # 1.923
cifar10-cond)          teacher=edm-cifar10-32x32-cond-vp     duration=800 ;;        # 1.710
imagenet64-cond)       teacher=edm-imagenet-64x64-cond-adm   duration=1000 ;;       # 1.524
ffhq64)                teacher=edm-ffhq-64x64-uncond-vp      duration=500 ;;        # 1.550
afhq64-v2)             teacher=edm-afhqv2-64x64-uncond-vp    duration=500 ;;        # 1.628
cifar10-uncond-sida)   teacher=edm-cifar10-32x32-uncond-vp   duration=300 ;;        # 1.499
cifar10-cond-sida)     teacher=edm-cifar10-32x32-cond-vp     duration=300 ;;        # 1.396
imagenet64-cond-sida)  teacher=edm-imagenet-64x64-cond-adm   duration=300 ;;        # 1.110
ffhq64-sida)           teacher=edm-ffhq-64x64-uncond-vp      duration=300 ;;        # 1.040
afhq64-v2-sida)        teacher=edm-afhqv2-64x64-uncond-vp    duration=300 ;;        # 1.276
imagenet512-edm2-xs)   teacher=edm2-img512-xs                duration=200 ;;        # 2.156 with SiDA
imagenet512-edm2-s)    teacher=edm2-img512-s                 duration=200 ;;        # 1.669 with SiDA
imagenet512-edm2-m)    teacher=edm2-img512-m                 duration=200 ;;        # 1.488 with SiDA
imagenet512-edm2-l)    teacher=edm2-img512-l                 duration=200 ;;        # 1.413 with SiDA
imagenet512-edm2-xl)   teacher=edm2-img512-xl                duration=200 ;;        # 1.379 with SiDA
imagenet512-edm2-xxl)  teacher=edm2-img512-xxl               duration=100 ;;        # 1.366 with SiDA
sd15)                  teacher=stable-diffusion-v1-5/stable-diffusion-v1-5  duration=10 ;;  # 8.15 on COCO
sd21)                  teacher=stabilityai/stable-diffusion-2-1-base        duration=10 ;;  # 9.52 on COCO
sdxl)                  teacher=stabilityai/stable-diffusion-xl-base-1.0     duration=10 ;;
sd35-medium)           teacher=stabilityai/stable-diffusion-3.5-medium      duration=2 ;;
sana)                  teacher=Efficient-Large-Model/Sana_600M_512px_diffusers  duration=2 ;;
flux-dev)              teacher=black-forest-labs/FLUX.1-dev                 duration=2 ;;
demo)                  teacher=assets/fashion-mnist-16/teacher.safetensors  duration=0.02 ;;
demo-text)             teacher=assets/emoji-32/teacher                      duration=0.004 ;;
auto)                  teacher=                                             duration=0.02 ;;
*) usage ;;
esac

extra= modules="torch numpy PIL click requests psutil tqdm safetensors"
case $recipe in demo-text | sd* | sana | flux-dev) extra=text modules="$modules diffusers transformers" ;; esac
source ./setup_env.sh "$extra" "from importlib.util import find_spec; assert all(map(find_spec, '$modules'.split()))"
if [ -z "${NPROC:-}" ]; then
    NPROC=$("$PYTHON" -c 'import os, torch; print(torch.cuda.device_count() or min(2, os.cpu_count() or 1))')
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The options of the command line come last, so that they win.
train() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" sid_train.py \
        --recipe="$recipe" ${teacher:+--edm_model="$teacher"} --duration="$duration" "$@"
}
newest() { ls -d training-runs/[0-9]*-"$1" | tail -n 1; }

train "$@"

case $recipe in demo | demo-text) ;; *) exit 0 ;; esac
case " $* " in *" -n "* | *" --dry-run"* | *--outdir* | *--nosubdir*) exit 0 ;; esac
case " $* " in *--desc*) exit 0 ;; esac
runs=$(newest "$recipe")
if [ "$recipe" = demo-text ]; then
    case " $* " in
    *--steps*) ;;
    *)
        # Four steps need less guidance than one to end as near to the guided teacher (docs/results.md).
        train --guidance=long-short=1.5 "$@" --steps=4 --desc=demo-text-4steps
        runs="$runs $(newest demo-text-4steps)"
        ;;
    esac
fi
if [ "$recipe" = demo-text ]; then
    assets=$(dirname "$teacher")
    match="fid.py eval --prompts=$assets/held-out.txt --clip=$assets/clip --metrics=clip99,name99,ground99"
    # The teacher takes as long as all that is printed before it, so it is measured meanwhile.
    theirs=$(mktemp)
    "$PYTHON" $match --network="$teacher" --steps=13 --guidance=2 >"$theirs" 2>&1 &
    measuring=$!
    trap 'kill "$measuring" 2>/dev/null || true; rm -f "$theirs"' EXIT
fi
one=${runs%% *} more=${runs#"$one"}
"$PYTHON" -m sid.report "$one" ${more:+--beside="${more# }"}
for run in $more; do "$PYTHON" -m sid.report "$run"; done
if [ "$recipe" = demo-text ]; then
    printf "\nPrompts that were never trained on: how often a small CLIP ranks an image's own prompt first (top1), how often\n"
    printf 'it ranks the name of the own picture first (name), and how often the ground has the right colour (ground)\n'
    for run in $runs; do
        printf '\nThe generator in %s:\n' "$run"
        "$PYTHON" $match --network="$run" | sed '/^{/d'
    done
    printf '\nThe guided teacher, 25 evaluations, each twice:\n'
    status=0
    wait "$measuring" || status=$?
    sed '/^{/d' "$theirs"
    exit "$status"
fi
