"""A differential-drive robot with LiDAR that has to find its goal: the small stand-in for a real one."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw

from lit_wm.errors import EnvError

RAYS = 24


class LidarRobot(gym.Env):
    """Drive to a goal among round obstacles in a square, walled room.

    An observation has 34 numbers: position (x, y) and heading (cos, sin), forward speed and turning rate, the
    goal in the robot's frame (ahead, left) and its distance, whether the last step was blocked, and 24 LiDAR
    distances counter-clockwise from straight ahead. Lengths are in units of half the room, speeds and
    distances of the LiDAR in units of their limits.

    An action is the wanted forward speed (-0.2 to 0.8 m/s) and turning rate (-2 to 2 rad/s), approached with
    a lag. A step that would touch something is not made. The reward is 1 on reaching the goal, which ends the
    episode, and 0 before; ``info["is_success"]`` says whether it was reached. The registered id
    ``lit_wm/LidarRobot-v0`` ends an episode after 100 steps, 20 seconds.

    Args:
        obstacles: how many, placed anew in every episode.
        room: side of the room in metres.
        goal_radius: distance from the goal in metres at which it is reached.
        render_mode: ``rgb_array`` or None.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    snapshot_fields = ("_pose", "_speed", "_goal", "_obstacles", "_contact")

    radius = 0.15  # of the robot, metres
    period = 0.2  # between two steps, seconds
    lag = 0.3  # time constant of speed and turning rate, seconds
    limits = np.array([0.8, 2.0])  # of speed (m/s) and turning rate (rad/s)
    lowest = np.array([-0.2, -2.0])
    reach = 3.0  # of the LiDAR, metres

    def __init__(
        self,
        obstacles: int = 3,
        room: float = 3.0,
        goal_radius: float = 0.4,
        render_mode: str | None = None,
    ):
        if (
            not isinstance(obstacles, int)
            or obstacles < 0
            or not 2.5 <= room < np.inf
            or not 0 < goal_radius < 1
        ):
            raise EnvError(
                f"LidarRobot: obstacles={obstacles!r}, room={room!r}, goal_radius={goal_radius!r}; expected "
                "a whole number, 2.5 metres or more, and less than 1 metre"
            )
        self.obstacles, self.half, self.goal_radius = obstacles, room / 2, goal_radius
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (10 + RAYS,), np.float32)
        low, high = self.lowest.astype(np.float32), self.limits.astype(np.float32)
        self.action_space = gym.spaces.Box(low, high)
        self._angles = np.arange(RAYS) * (2 * math.pi / RAYS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        """Place robot, goal and obstacles; obstacles may overlap, robot and goal stand free."""
        super().reset(seed=seed)
        rng, inner = self.np_random, self.half - 0.3
        start = rng.uniform(-inner, inner, 2)
        self._goal = rng.uniform(-inner, inner, 2)
        while np.linalg.norm(self._goal - start) < 1.0:
            self._goal = rng.uniform(-inner, inner, 2)
        placed = []  # x, y, radius
        for _ in range(self.obstacles):
            for _ in range(1000):
                place, radius = rng.uniform(-self.half, self.half, 2), rng.uniform(0.15, 0.35)
                near = min(np.linalg.norm(place - start), np.linalg.norm(place - self._goal))
                if near > radius + self.goal_radius + self.radius:  # room left to pass behind it
                    placed.append([*place, radius])
                    break
        self._obstacles = np.array(placed).reshape(-1, 3)
        self._pose = np.array([*start, rng.uniform(-math.pi, math.pi)])
        self._speed, self._contact = np.zeros(2), 0.0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Drive for one period."""
        wanted = np.clip(np.asarray(action, np.float64), self.lowest, self.limits)
        self._speed = wanted + (self._speed - wanted) * math.exp(-self.period / self.lag)
        heading = self._pose[2] + self._speed[1] * self.period
        middle = (self._pose[2] + heading) / 2
        way = self._speed[0] * self.period * np.array([math.cos(middle), math.sin(middle)])
        self._pose[2] = math.remainder(heading, 2 * math.pi)
        self._contact = 0.0 if self._free(self._pose[:2] + way) else 1.0
        if self._contact:
            self._speed[0] = 0.0
        else:
            self._pose[:2] += way
        reached = bool(np.linalg.norm(self._goal - self._pose[:2]) < self.goal_radius)
        return self._observe(), float(reached), reached, False, {"is_success": reached}

    def _free(self, place: np.ndarray) -> bool:
        apart = np.linalg.norm(self._obstacles[:, :2] - place, axis=1) > self._obstacles[:, 2] + self.radius
        return bool(apart.all() and (np.abs(place) < self.half - self.radius).all())

    def lidar(self) -> np.ndarray:
        """Distance to wall or obstacle along each ray in metres, at most ``reach``. (24,)"""
        angles = self._pose[2] + self._angles
        ray = np.stack([np.cos(angles), np.sin(angles)], 1)  # (24, 2)
        with np.errstate(divide="ignore"):
            walls = ((np.copysign(self.half, ray) - self._pose[:2]) / ray).min(1)  # (24,)
        to = self._obstacles[:, :2] - self._pose[:2]  # (n, 2)
        along = ray @ to.T  # (24, n): how far ahead an obstacle's centre is, then how far off the ray
        off = np.square(to).sum(1) - np.square(along)
        depth = np.square(self._obstacles[:, 2]) - off
        hit = np.where((depth > 0) & (along > 0), along - np.sqrt(np.maximum(depth, 0)), np.inf)
        return np.minimum(np.minimum(walls, hit.min(1, initial=np.inf)), self.reach)

    def _observe(self) -> np.ndarray:
        x, y, heading = self._pose
        cos, sin = math.cos(heading), math.sin(heading)
        dx, dy = self._goal - self._pose[:2]
        goal = np.array([cos * dx + sin * dy, cos * dy - sin * dx, math.hypot(dx, dy)]) / self.half
        state = [x / self.half, y / self.half, cos, sin, *(self._speed / self.limits), *goal, self._contact]
        return np.concatenate([state, self.lidar() / self.reach]).astype(np.float32)

    def render(self) -> np.ndarray:
        """The room from above: robot blue with its rays, goal green, obstacles grey. (256, 256, 3) uint8"""
        scale = 256 / (2 * self.half)

        def pixel(point: np.ndarray) -> tuple[float, float]:
            return (point[0] + self.half) * scale, (self.half - point[1]) * scale

        image = Image.new("RGB", (256, 256), "white")
        draw = ImageDraw.Draw(image)

        def disc(point: np.ndarray, radius: float, colour: str) -> None:
            draw.circle(pixel(point), radius * scale, fill=colour)

        place, angles = self._pose[:2], self._pose[2] + self._angles
        disc(self._goal, self.goal_radius, "#9fd89f")
        for x, y, radius in self._obstacles:
            disc(np.array([x, y]), radius, "#888888")
        for angle, distance in zip(angles, self.lidar(), strict=True):
            end = place + distance * np.array([math.cos(angle), math.sin(angle)])
            draw.line([pixel(place), pixel(end)], fill="#f2c0c0")
        disc(place, self.radius, "#3b6fd4")
        nose = place + self.radius * np.array([math.cos(angles[0]), math.sin(angles[0])])
        draw.line([pixel(place), pixel(nose)], fill="white", width=2)
        return np.asarray(image)
