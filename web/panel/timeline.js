// The last two minutes of one device: what was in use, its peak, and which phase it belonged to.

const SECONDS = 120;

/** Collects points and draws them when it is told to; it has no timer of its own. */
export class Timeline {
  constructor(canvas) {
    this.canvas = canvas;
    this.points = [];
    this.phases = [];
    this.total = 0;
  }

  /** A reading: seconds on the server's clock, bytes in use or null, and the size of the device or null. */
  add(time, used, total) {
    const last = this.points[this.points.length - 1];
    if (last && time < last.time) this.points = []; // the server was started anew
    this.points.push({ time, used });
    this.total = total ?? this.total;
    while (this.points.length && this.points[0].time < time - SECONDS) this.points.shift();
  }

  peak() {
    const known = this.points.map((point) => point.used).filter((used) => used !== null);
    return known.length ? Math.max(...known) : null;
  }

  draw() {
    const { canvas, points } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const style = getComputedStyle(canvas);
    const colour = (name) => style.getPropertyValue(name).trim();
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const now = points.length ? points[points.length - 1].time : 0;
    const peak = this.peak();
    const top = Math.max(this.total || 0, peak || 0) || 1;
    const x = (time) => width - ((now - time) / SECONDS) * width;
    const y = (bytes) => height - 1 - (bytes / top) * (height - 2);

    this.drawPhases(pen, x, now, height, colour);
    pen.beginPath();
    let open = false;
    for (const { time, used } of points) {
      if (used === null) open = false;
      else if (open) pen.lineTo(x(time), y(used));
      else pen.moveTo(x(time), y(used));
      open = used !== null;
    }
    pen.strokeStyle = colour("--svr-line");
    pen.lineWidth = 1.5;
    pen.stroke();
    if (peak !== null) {
      pen.setLineDash([4, 3]);
      pen.strokeStyle = colour("--svr-peak");
      pen.lineWidth = 1;
      pen.beginPath();
      pen.moveTo(0, y(peak));
      pen.lineTo(width, y(peak));
      pen.stroke();
      pen.setLineDash([]);
    }
  }

  drawPhases(pen, x, now, height, colour) {
    pen.font = "10px sans-serif";
    pen.textBaseline = "top";
    this.phases.forEach((phase, index) => {
      const end = phase.end ?? now;
      if (end < now - SECONDS) return;
      const left = Math.max(0, x(phase.start));
      const width = x(end) - left;
      pen.fillStyle = colour(index % 2 ? "--svr-band-odd" : "--svr-band-even");
      pen.fillRect(left, 0, width, height);
      if (width < 24) return;
      pen.save();
      pen.beginPath();
      pen.rect(left, 0, width - 2, height);
      pen.clip();
      pen.fillStyle = colour("--svr-quiet");
      pen.fillText(phase.name, left + 3, 2);
      pen.restore();
    });
  }
}
