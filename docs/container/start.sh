# What the container runs: `demo` or `serve`, with their own options behind; `health` asks whether it answers.
what=$1
shift
case $what in
demo) exec streamlit run app.py --server.port=8501 --server.address=0.0.0.0 --server.headless=true -- "$@" ;;
serve) exec python -m serve --host 0.0.0.0 --port 8501 "$@" ;;
health)
    for path in _stcore/health health; do # the demo's, and the endpoint's
        python -c "import urllib.request; urllib.request.urlopen('http://localhost:8501/$path')" 2> /dev/null && exit
    done
    exit 1
    ;;
*)
    echo "error: there is no $what; run demo or serve" >&2
    exit 2
    ;;
esac
