// A photo from the device's camera.

import { $, open } from "./dom.js";

/** The photo that somebody took, or null. */
export async function photo() {
  const dialog = $("camera");
  const video = $("video");
  $("camera-error").textContent = "";
  $("camera-ok").disabled = true;
  const taken = open(dialog);
  let stream = null;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    video.srcObject = stream;
    await video.play();
    $("camera-ok").disabled = false;
  } catch (error) {
    if (dialog.open) $("camera-error").textContent = `The camera cannot be used: ${error.message}`;
  }
  try {
    return (await taken) && stream ? await still(video) : null;
  } finally {
    stream?.getTracks().forEach(track => track.stop());
    video.srcObject = null;
  }
}

function still(video) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise(resolve =>
    canvas.toBlob(blob => resolve(new File([blob], "photo.jpg", { type: "image/jpeg" })), "image/jpeg", 0.92),
  );
}
