# The environment of the course: docker build -t minids . && docker run --rm -p 8888:8888 minids
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home learner
USER learner
WORKDIR /home/learner/minids
COPY --chown=learner . .
RUN python3 -c "import course; course.set_up()"
RUN .venv/bin/python -m nbformat.sign chapters/*.ipynb
EXPOSE 8888
CMD [".venv/bin/python", "-m", "jupyterlab", "--ip=0.0.0.0", "--no-browser", "--LabApp.default_url=/lab/tree/chapters/00_claims.ipynb"]
