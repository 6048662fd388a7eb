# The demo with the captioner in pretrained/; docs/space/README.md says how to publish it as a Hugging Face Space.
#   docker build -t captions . && docker run --rm -p 8501:8501 captions
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 user
USER 1000
ENV HOME=/home/user PATH=/home/user/.local/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /home/user/app

COPY --chown=1000 requirements.txt requirements-extras.txt ./
# PyTorch's own index has wheels for the CPU, which go before the equal ones with 4 GB of CUDA libraries.
RUN pip install --no-cache-dir --user -r requirements.txt -r requirements-extras.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu

COPY --chown=1000 . .

EXPOSE 8501
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8501/_stcore/health')"]
# A Space shows the page inside another site's, where browsers keep back the cookie that uploads would be checked by.
CMD ["streamlit", "run", "app.py", "--server.port=8501", "--server.address=0.0.0.0", "--server.headless=true", \
     "--server.enableXsrfProtection=false"]
