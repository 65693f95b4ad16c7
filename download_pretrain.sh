#!/bin/sh
# Fetches dense pretrained weights into pretrained/, next to this script:
#
#   sh download_pretrain.sh [arch ...]      (none: deit_small lvvit_s lvvit_m)
#
# Correct files stay, broken-off downloads are resumed, and the hash in a name is checked.
# To use a mirror, set the environment variables DEIT_URL, LVVIT_URL, SWIN_URL and CONVNEXT_URL (folders, see below).
set -eu

DEIT_URL=${DEIT_URL:-https://dl.fbaipublicfiles.com/deit}
LVVIT_URL=${LVVIT_URL:-https://github.com/zihangJiang/TokenLabeling/releases/download/1.0}
SWIN_URL=${SWIN_URL:-https://github.com/SwinTransformer/storage/releases/download/v1.0.0}
CONVNEXT_URL=${CONVNEXT_URL:-https://dl.fbaipublicfiles.com/convnext}
KNOWN="deit_tiny deit_small deit_base lvvit_s lvvit_m swin_t swin_s swin_b convnext_t convnext_s convnext_b"

die() {
    echo "download_pretrain.sh: $*" >&2
    exit 1
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# Sets file, url, and the hash that the file's name carries (empty: none).
lookup() {
    remote= # the name on the server, where it is another: LV-ViT's were renamed after DynamicViT's release
    case $1 in
    deit_tiny) base=$DEIT_URL file=deit_tiny_patch16_224-a1311bcf.pth ;;
    deit_small) base=$DEIT_URL file=deit_small_patch16_224-cd65a155.pth ;;
    deit_base) base=$DEIT_URL file=deit_base_patch16_224-b5f2ef4d.pth ;;
    lvvit_s) base=$LVVIT_URL file=lvvit_s-224-83.3.pth.tar remote=lvvit_s-26M-224-83.3.pth.tar ;;
    lvvit_m) base=$LVVIT_URL file=lvvit_m-56M-224-84.0.tar remote=lvvit_m-56M-224-84.0.pth.tar ;;
    swin_t) base=$SWIN_URL file=swin_tiny_patch4_window7_224.pth ;;
    swin_s) base=$SWIN_URL file=swin_small_patch4_window7_224.pth ;;
    swin_b) base=$SWIN_URL file=swin_base_patch4_window7_224.pth ;;
    convnext_t) base=$CONVNEXT_URL file=convnext_tiny_1k_224_ema.pth ;;
    convnext_s) base=$CONVNEXT_URL file=convnext_small_1k_224_ema.pth ;;
    convnext_b) base=$CONVNEXT_URL file=convnext_base_1k_224_ema.pth ;;
    deit_256) die "deit_256 has no published dense weights; train it from scratch, or use one of: $KNOWN" ;;
    *) die "unknown arch '$1'; known: $KNOWN" ;;
    esac
    url=${base%/}/${remote:-$file}
    hash=$(expr "$file" : '.*-\([0-9a-f]\{8\}\)\.pth$') || hash=
}

# Is $1 there, not empty, and of the right hash if its name carries one?
correct() {
    [ -s "$1" ] || return 1
    [ -n "$hash" ] || return 0
    case $($sha256 <"$1") in
    "$hash"*) return 0 ;;
    *) return 1 ;;
    esac
}

size() {
    if [ -f "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi
}

# Downloads $url to $part, or what is missing of it, and sets status to the tool's exit status.
# Progress is for terminals only.
transfer() {
    status=0
    if [ "$tool" = curl ]; then
        if [ -t 2 ]; then quiet=; else quiet=--silent; fi
        code=$(curl $quiet --fail --location --connect-timeout 30 --speed-time 60 \
            --continue-at - --output "$part" --write-out '%{http_code}' "$url") || status=$?
        # Nothing left to resume: an error for some versions of curl, a success for others.
        [ "$code" != 416 ] || status=33
    else
        if [ -t 2 ]; then quiet=; else quiet=-q; fi
        wget $quiet -T 60 -c -O "$part" "$url" || status=$?
    fi
}

download() {
    start=$(size "$part")
    transfer
    case $tool:$status:$(size "$part") in
    # Anew, where resuming cannot work (curl's 33: the server sends whole files only; wget copes),
    # or added nothing: the server has no more bytes than we, so ours may be of another file.
    curl:33:* | *:0:"$start")
        rm -f "$part"
        transfer
        ;;
    esac
    [ -s "$part" ] || rm -f "$part"
    case $tool:$status in
    *:0) ;;
    curl:22 | wget:8) die "the server refused $url; check the address (DEIT_URL, LVVIT_URL) or try later" ;;
    curl:23 | wget:3) die "cannot write $PWD/$part; is the disk full?" ;;
    *) die "download of $url broke off ($tool: $status); check the network, then run this again to resume" ;;
    esac
}

fetch() {
    lookup "$1"
    part=$file.part
    if [ -e "$file" ]; then
        if correct "$file"; then
            echo "$1: pretrained/$file is there already"
            return
        fi
        echo "$1: pretrained/$file is damaged, fetching it anew"
        rm -f "$file"
    fi
    if [ -z "$hash" ] || ! correct "$part"; then
        echo "$1: fetching $url"
        download
    fi
    if ! correct "$part"; then
        rm -f "$part"
        [ -n "$hash" ] || die "$url is empty; nothing saved, run this again or try another server (LVVIT_URL, SWIN_URL, CONVNEXT_URL)"
        die "$url is damaged (sha256 is not $hash...); nothing saved, run this again or try another server (DEIT_URL)"
    fi
    mv "$part" "$file"
    echo "$1: saved pretrained/$file"
}

[ $# -gt 0 ] || set -- deit_small lvvit_s lvvit_m
for arch in "$@"; do
    lookup "$arch" # stops at a wrong name before anything is fetched
done

if have curl; then
    tool=curl
elif have wget; then
    tool=wget
else
    die "needs curl or wget; install one of them"
fi
if have sha256sum; then
    sha256=sha256sum
elif have shasum; then
    sha256="shasum -a 256"
else
    die "needs sha256sum or shasum to check the files; install one of them"
fi

cd "$(dirname "$0")"
mkdir -p pretrained 2>/dev/null && [ -w pretrained ] || die "cannot write to $PWD/pretrained; check its permissions"
cd pretrained
for arch in "$@"; do
    fetch "$arch"
done
