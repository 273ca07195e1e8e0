"""A Django project in one file: main:asgi and main:wsgi."""
import os

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import JsonResponse, StreamingHttpResponse
from django.urls import path

settings.configure(
    SECRET_KEY="only for tests",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    DATA_UPLOAD_MAX_MEMORY_SIZE=16 << 20,
)


def index(request):
    return JsonResponse({"django": django.VERSION[0], "path": request.path, "pid": os.getpid()})


def item(request, number):
    return JsonResponse({"item": number, "q": request.GET.get("q", "")})


def body(request):
    return JsonResponse({"method": request.method, "body_bytes": len(request.body)})


def stream(request):
    return StreamingHttpResponse(b"%05d" % number for number in range(1000))


urlpatterns = [path("", index), path("item/<int:number>", item), path("body", body),
               path("stream", stream)]
asgi = get_asgi_application()
wsgi = get_wsgi_application()
